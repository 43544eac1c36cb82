"""Read examples once: their embeddings, and how the model takes each of their answers.

All that is asked about a picture is one row of branches (`cafe.model.trie`), so the picture is
paid for once however many questions there are, and nothing is generated. Still the row tells what
greedy decoding would write: it writes the given answer, and then stops, exactly if at every token
of that answer and of its end the given token is the most probable one. (Up to the first token that
is not, decoding and the row have the same past; there they part.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cafe.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from cafe.model.rows import Chunk
    from cafe.model.vlm import CAFe
    from cafe.types import Example

_POSITIONS_AT_ONCE = 1024  # whose logits exist at one time: 1024 x vocabulary floats


@dataclass(frozen=True, slots=True)
class Answer:
    """One assistant turn, the token that ends it included.

    nll_nats  negative log-likelihood, summed over its tokens
    tokens    how many those are
    greedy    whether greedy decoding would have written exactly this and stopped
    """

    nll_nats: float
    tokens: int
    greedy: bool


@dataclass(frozen=True, slots=True)
class Reading:
    """What one example's row told.

    query, target  embeddings before normalisation, float32 [d]; None without a pair
    answers        one per assistant turn, dialogue by dialogue
    """

    query: Float[np.ndarray, " d"] | None
    target: Float[np.ndarray, " d"] | None
    answers: tuple[Answer, ...]


def greedy_matches(
    model: CAFe, examples: Sequence[Example], *, batch_size: int = 16
) -> list[tuple[bool, ...]]:
    """For each example, per assistant turn: would greedy decoding have given exactly it?

    Raises:
        DataError: as in `read_examples`.
    """
    readings = read_examples(model, examples, batch_size=batch_size)
    return [tuple(answer.greedy for answer in reading.answers) for reading in readings]


@torch.inference_mode()
def read_examples(
    model: CAFe, examples: Sequence[Example], *, batch_size: int = 16
) -> list[Reading]:
    """One forward per `batch_size` examples.

    Raises:
        DataError: answers that do not each end with the token that ends a turn, and what the
            collator raises.
    """
    readings: list[Reading] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        readings += _read_chunk(model, batch, model.collator(batch).to(model.device))
    return readings


def _read_chunk(model: CAFe, examples: Sequence[Example], chunk: Chunk) -> list[Reading]:
    states = model(chunk.rows, chunk.vision).flatten(0, 1)
    embeddings = states[chunk.rows.pooled].float().cpu().numpy()
    nll, greedy = token_scores(model, states[chunk.rows.label_source], chunk.rows.label_ids)
    answers = _answers(model, chunk.rows.label_ids.cpu().numpy(), nll, greedy)

    turns = [sum(m.role == "assistant" for d in e.dialogues for m in d) for e in examples]
    if len(answers) != sum(turns):
        raise DataError(
            f"examples {chunk.ids[0]!r} to {chunk.ids[-1]!r}: {sum(turns)} answers, but "
            f"{len(answers)} of the token {model.collator.pooled_token!r} that ends one; the chat "
            "template must write it after each answer"
        )
    ends = np.cumsum(turns)
    pairs = iter(range(chunk.pairs))
    readings = []
    for example, end, count in zip(examples, ends, turns, strict=True):
        pair = next(pairs) if example.query is not None else None
        readings.append(
            Reading(
                query=None if pair is None else embeddings[pair],
                target=None if pair is None else embeddings[chunk.pairs + pair],
                answers=tuple(answers[end - count : end]),
            )
        )
    return readings


def token_scores(
    model: CAFe, states: Float[Tensor, "l d"], labels: Int[Tensor, " l"]
) -> tuple[Float[np.ndarray, " l"], Bool[np.ndarray, " l"]]:
    """Per labelled token its negative log-likelihood in nats, and whether it is the likeliest.

    states[i] is the hidden state that predicts the token labels[i].
    """
    nll = np.zeros(len(labels))
    greedy = np.zeros(len(labels), dtype=bool)
    for start in range(0, len(labels), _POSITIONS_AT_ONCE):
        part = slice(start, start + _POSITIONS_AT_ONCE)
        logits = model.lm_head(states[part]).float()
        if model.logit_softcap is not None:
            logits = model.logit_softcap * torch.tanh(logits / model.logit_softcap)
        losses = torch.nn.functional.cross_entropy(logits, labels[part], reduction="none")
        nll[part] = losses.cpu().numpy()
        greedy[part] = (logits.argmax(dim=1) == labels[part]).cpu().numpy()
    return nll, greedy


def _answers(
    model: CAFe,
    labels: Int[np.ndarray, " l"],
    nll: Float[np.ndarray, " l"],
    greedy: Bool[np.ndarray, " l"],
) -> list[Answer]:
    """Cut a chunk's labelled tokens into answers: each ends with the token that ends a turn."""
    end = model.processor.tokenizer.convert_tokens_to_ids(model.collator.pooled_token)
    stops = np.flatnonzero(labels == end) + 1
    return [
        Answer(float(nll[begin:stop].sum()), int(stop - begin), bool(greedy[begin:stop].all()))
        for begin, stop in pairwise([0, *stops])
    ]
