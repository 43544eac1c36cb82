"""A model as a stock `CrossEncoder` of sentence-transformers: the match question, and `LogitScore`.

A cross-encoder reads a query and a document together and gives one score. Here that is the match
question of `CAFe.score`: a chat template turns the pair into it, and `LogitScore` takes the logit
of "yes" minus that of "no". No code comes with the directory, and vLLM reads it too:
`classifier_from_token` and `method` in config.json make a classifier of these two rows of the
language head.

`LogitScore` and vLLM take one token for each answer, whereas `CAFe.score` adds up the spellings
("yes", "Yes", …). So the pair of tokens with the most probability is chosen and written to
config.json, where cafe reads it as well: of this directory, every tool gives the same score.

It is a directory of its own, with weights of its own. One directory has one `modules.json` and one
`sentence_bert_config.json`, and those of an embedding model load another class of transformers,
format a single input and pool it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch

from cafe.errors import CafeError, CheckpointError
from cafe.files import whole_directory
from cafe.model.checkpoint.adapter import is_adapter
from cafe.model.checkpoint.directory import quiet, weights_dtype
from cafe.model.checkpoint.locate import locate
from cafe.model.checkpoint.sentence_transformers_files import is_cross_encoder
from cafe.model.head import token_log_probs
from cafe.model.judging import log_odds
from cafe.model.rerank import ANSWER_TOKENS_KEY, named_answer_tokens
from cafe.model.rows.inputs import as_conversation
from cafe.model.rows.matching import match_question
from cafe.model.rows.prompts import default_chat_template, jinja_string
from cafe.model.vlm import CAFe
from cafe.release.verify import probe_inputs
from cafe.types import MATCH_QUESTION, Conversation, Message

MATCH_TEMPLATE = "match_template.jinja"

SCORES_EXACT = 1e-4
"""Largest difference of two log-odds that another order of summation explains, in float32."""

_ASK = """\
{%- set pair = namespace(query=[], document=[]) -%}
{%- for message in messages if message['role'] in ['query', 'document'] -%}
  {%- set content = message['content'] -%}
  {%- set parts = [{'type': 'text', 'text': content}] if content is string else content | list -%}
  {%- if message['role'] == 'query' -%}{%- set pair.query = pair.query + parts -%}
  {%- else -%}{%- set pair.document = pair.document + parts -%}{%- endif -%}
{%- endfor -%}
{%- set asks = namespace(shown=pair.query, said=pair.document) -%}
{%- if pair.document | rejectattr('type', 'equalto', 'text') | list -%}
  {%- set asks.shown = pair.document -%}{%- set asks.said = pair.query -%}
{%- endif -%}
{%- set images = asks.shown | rejectattr('type', 'equalto', 'text') | list -%}
{%- set statement = asks.said | selectattr('type', 'equalto', 'text') | map(attribute='text') \
| join(' ') -%}
{%- if not statement or not asks.shown or asks.said | rejectattr('type', 'equalto', 'text') | list \
or (images and (asks.shown | length != 1 or images[0]['type'] != 'image')) -%}
  {{- raise_exception(<<sides>>) -}}
{%- endif -%}
{%- set question = <<before>> + statement + <<after>> -%}
{%- if images -%}
  {%- set parts = images + [{'type': 'text', 'text': question}] -%}
{%- else -%}
  {%- set parts = [{'type': 'text', 'text': asks.shown | map(attribute='text') | join(' ') \
+ '\\n' + question}] -%}
{%- endif -%}
{%- set before = messages | rejectattr('role', 'in', ['query', 'document']) | list -%}
{%- set messages = before + [{'role': 'user', 'content': parts}] -%}
{%- set add_generation_prompt = true -%}
"""

_TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
_SCORE = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"

_SIDES = "a pair is one image and a text, in any order, or two texts"


@dataclass(frozen=True, slots=True)
class CrossEncoderReport:
    """What was written, or read, and how its scores compare.

    directory   the directory
    tokens      that stand for no and for yes
    pairs       number of probe pairs that were scored
    spellings   largest difference, in log-odds, to the source's scores, which add up all spellings
                of yes and of no; None: not asked
    difference  largest difference, in log-odds, between the stock CrossEncoder and cafe; None: not
                asked
    """

    directory: Path
    tokens: tuple[str, str]
    pairs: int
    spellings: float | None = None
    difference: float | None = None


class ProbePair(NamedTuple):
    """A pair as sentence-transformers takes it, and the question that it must become."""

    sides: tuple[Any, Any]
    question: Conversation


def export_cross_encoder(
    model: str | Path, to: str | Path, *, verify: bool = False
) -> CrossEncoderReport:
    """Write `model` to the new directory `to`, as a stock CrossEncoder.

    The written model is read back and must score the probes as `model` does with these two tokens.

        >>> from cafe.release.cross_encoder import export_cross_encoder
        >>> export_cross_encoder("tiny", "reranker").tokens
        ('no', 'yes')
        >>> from sentence_transformers import CrossEncoder
        >>> CrossEncoder("reranker").predict([("a.png", "a red square")])  # as `CAFe.score`

    Args:
        model: "tiny", a checkpoint directory, or a hub id.
        to: A directory that does not exist yet, or is empty.
        verify: Also score the probes with the stock CrossEncoder (`verify_cross_encoder`).

    Raises:
        CheckpointError: `to` is not new or cannot be written, `model` is an adapter, or scores
            differ. Nothing is left at `to`.
        CafeError: sentence-transformers is not installed, which `verify` needs.
    """
    to = Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CheckpointError(f"{to}: already exists; name a new directory")
    if is_adapter(locate(model)):
        raise CheckpointError(
            f"{model}: is an adapter, which CrossEncoder does not load; merge it first: "
            f"cafe export {model} --to DIR --merge"
        )
    try:
        with whole_directory(to.absolute()) as unfinished:
            report = _write(model, unfinished)
            found = verify_cross_encoder(unfinished).difference if verify else None
    except OSError as error:
        raise CheckpointError(
            f"{to}: cannot be written ({' '.join(str(error).split())})"
        ) from error
    return CrossEncoderReport(to, report.tokens, report.pairs, report.spellings, found)


def verify_cross_encoder(directory: str | Path) -> CrossEncoderReport:
    """Compare the stock CrossEncoder's scores of the probe pairs with cafe's, in float32.

    Raises:
        CheckpointError: scores differ, or the directory is no cross-encoder.
        CafeError: sentence-transformers is not installed.
    """
    directory = locate(directory)
    if not is_cross_encoder(directory):
        raise CheckpointError(
            f"{directory}: is not a cross-encoder; write one: cafe export {directory} "
            "--cross-encoder DIR"
        )
    try:
        from sentence_transformers import CrossEncoder
    except ImportError as error:
        raise CafeError(
            "--verify needs sentence-transformers: pip install 'cafe-vlm[st]', or leave --verify "
            "out"
        ) from error
    model = CAFe.from_pretrained(directory, dtype=torch.float32, device="cpu")
    pairs, tokens = probe_pairs(), _own_tokens(model)
    expected = log_odds(model, [pair.question for pair in pairs], 8).numpy()
    del model
    with quiet():
        stock = CrossEncoder(
            str(directory),
            device="cpu",
            trust_remote_code=False,
            model_kwargs={"dtype": torch.float32},
        )
        found = stock.predict(
            [pair.sides for pair in pairs],
            activation_fn=torch.nn.Identity(),
            show_progress_bar=False,
        )
    difference = float(np.abs(found - expected).max())
    if not difference <= SCORES_EXACT:  # written so that NaN fails too
        raise CheckpointError(
            f"{directory}: the scores of {len(pairs)} pairs by sentence-transformers "
            f"{metadata.version('sentence-transformers')} are up to {difference:.1e} from cafe's "
            f"(log-odds; tolerance {SCORES_EXACT:.0e}); do not publish it, and write it again with "
            "this version of cafe"
        )
    return CrossEncoderReport(directory, tokens, len(pairs), difference=difference)


def probe_pairs() -> list[ProbePair]:
    """Images with texts in both orders, and two texts, where the first stands for the image."""
    probes = probe_inputs()
    texts: list[Any] = [probe for probe in probes if isinstance(probe, str)]
    images: list[Any] = [probe for probe in probes if isinstance(probe, PIL.Image.Image)]
    pairs = []
    for image, text in zip(images, texts, strict=True):
        question = match_question(as_conversation(image), as_conversation(text))
        pairs += [ProbePair((image, text), question), ProbePair((text, image), question)]
    for shown, said in pairwise(texts):
        asked = f"{shown}\n{MATCH_QUESTION.format(statement=said)}"
        pairs.append(ProbePair((shown, said), (Message("user", (asked,)),)))
    return pairs


def match_template(chat_template: str) -> str:
    """The Jinja text that turns a pair into its match question, in the style of `chat_template`.

    The sides come as messages of the roles "query" and "document", as sentence-transformers and
    vLLM write them. Of two texts the query's stands where the image would: nothing was trained so.
    """
    before, after = MATCH_QUESTION.split("{statement}")
    ask = _ASK.replace("<<sides>>", jinja_string(_SIDES))
    ask = ask.replace("<<before>>", jinja_string(before)).replace("<<after>>", jinja_string(after))
    return ask + chat_template


def _write(source: str | Path, directory: Path) -> CrossEncoderReport:
    """Write the cross-encoder, read it back with cafe, and compare scores."""
    model = CAFe.from_pretrained(source, dtype=torch.float32, device="cpu")
    questions = [pair.question for pair in probe_pairs()]
    spelled = log_odds(model, questions, 8)
    tokens = _likely_tokens(model, questions)
    setattr(model.model.config, ANSWER_TOKENS_KEY, list(tokens))
    model.model.config.method = "from_2_way_softmax"  # vLLM: sigmoid of the difference
    before = log_odds(model, questions, 8)
    model.model.to(weights_dtype(source))
    model.save_pretrained(directory)
    ids = model.processor.tokenizer.convert_tokens_to_ids(list(tokens))
    template = match_template(default_chat_template(model.processor))
    del model
    (directory / MATCH_TEMPLATE).write_text(template, encoding="utf-8")
    for module in ("1_Pooling", "2_Normalize", "3_WordWeights"):
        shutil.rmtree(directory / module, ignore_errors=True)
    for name, content in _files(template, ids).items():
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    written = CAFe.from_pretrained(directory, dtype=torch.float32, device="cpu")
    apart = float((log_odds(written, questions, 8) - before).abs().max())
    if not apart <= SCORES_EXACT:
        raise CheckpointError(
            f"model {str(source)!r}: after writing it, the scores of {len(questions)} pairs are up "
            f"to {apart:.1e} apart (log-odds), more than {SCORES_EXACT:.0e}"
        )
    spellings = float((spelled - before).abs().max())
    return CrossEncoderReport(directory, tokens, len(questions), spellings)


def _own_tokens(model: CAFe) -> tuple[str, str]:
    """The tokens for no and for yes that config.json names.

    Raises:
        CheckpointError: it names none.
    """
    ids = named_answer_tokens(model.model.config, model.processor.tokenizer)
    if ids is None:
        raise CheckpointError(
            f"config.json: names no {ANSWER_TOKENS_KEY}; write the directory again"
        )
    no, yes = model.processor.tokenizer.convert_ids_to_tokens(ids)
    return no, yes


@torch.inference_mode()
def _likely_tokens(model: CAFe, questions: Sequence[Conversation]) -> tuple[str, str]:
    """Of the spellings of no and yes, the first tokens of the one that the model gives most.

    Raises:
        CheckpointError: no spelling begins with different tokens.
    """
    tokenizer, words = model.processor.tokenizer, ("no", "yes")
    rows, vision = model.collator.prompt_rows(list(questions))
    states = model.hidden_at(rows, vision)
    mass: dict[tuple[int, int], float] = {}
    for spelling in ("{}", " {}"):
        for form in (words, tuple(map(str.capitalize, words))):
            no, yes = (
                tokenizer(spelling.format(word), add_special_tokens=False)["input_ids"][0]
                for word in form
            )
            if no != yes:  # as a lone space would be
                both = torch.tensor([[no, yes]]).expand(len(states), 2).flatten()
                each, _ = token_log_probs(model, states.repeat_interleave(2, 0), both)
                mass[no, yes] = float(each.exp().sum())
    if not mass:
        raise CheckpointError("the tokenizer begins yes and no with the same token")
    no, yes = tokenizer.convert_ids_to_tokens(max(mass, key=lambda ids: mass[ids]))
    return no, yes


def _files(template: str, ids: Sequence[int]) -> dict[str, Any]:
    """Contents of sentence-transformers' files, by name."""
    forward = {"method": "forward", "method_output_name": "logits"}
    no, yes = ids
    return {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": _TRANSFORMER},
            {"idx": 1, "name": "1", "path": "1_LogitScore", "type": _SCORE},
        ],
        "config_sentence_transformers.json": {
            "__version__": {
                "pytorch": torch.__version__,
                "sentence_transformers": "6.2.0",
                "transformers": metadata.version("transformers"),
            },
            "activation_fn": "torch.nn.modules.activation.Sigmoid",
            "default_prompt_name": None,
            "model_type": "CrossEncoder",
            "prompts": {},
        },
        "sentence_bert_config.json": {
            "transformer_task": "any-to-any",
            "modality_config": {
                "text": forward,
                "image": forward,
                "message": {**forward, "format": "structured"},
            },
            "module_output_name": "causal_logits",
            "processing_kwargs": {"chat_template": {"chat_template": template}},
        },
        "1_LogitScore/config.json": {"true_token_id": yes, "false_token_id": no},
    }
