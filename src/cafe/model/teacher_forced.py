"""Score given answers in one forward (teacher forcing): no text is generated.

All questions about an image are branches of one row (`cafe.model.rows.trie`), so the image is
computed once however many questions there are. The row also says whether greedy decoding would
write the given answer and stop: exactly if every token of the answer, and the token that ends the
turn, is the most probable one at its position. (Up to the first token that is not, decoding and the
row have the same past.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from cafe.errors import DataError
from cafe.model.head import token_log_probs
from cafe.model.inference import InferenceModel

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from cafe.model.rows.chunk import Chunk
    from cafe.types import Example

_CHUNK_TOKENS = 1024  # positions whose logits exist at one time: 1024 x vocabulary floats


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """One assistant turn, including the token that ends it.

    nll_nats  negative log-likelihood, summed over its tokens
    tokens    number of tokens
    greedy    whether greedy decoding would have written exactly this and stopped
    """

    nll_nats: float
    tokens: int
    greedy: bool


@dataclass(frozen=True, slots=True)
class TeacherForcedScores:
    """The embeddings and answer scores of one example.

    query, target  embeddings before normalisation, float32 [d]; None without a pair
    answers        one per assistant turn, dialogue by dialogue
    """

    query: Float[np.ndarray, " d"] | None
    target: Float[np.ndarray, " d"] | None
    answers: tuple[AnswerScore, ...]


@torch.inference_mode()
def score_examples(
    model: InferenceModel, examples: Sequence[Example], *, batch_size: int = 16
) -> list[TeacherForcedScores]:
    """Embed and score each example, with one forward per `batch_size` examples.

    Raises:
        DataError: the chat template does not end each answer with the token that ends a turn, or
            the collator rejects an example.
    """
    scores: list[TeacherForcedScores] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        scores += _score_chunk(model, batch, model.collator(batch).to(model.device))
    return scores


def _score_chunk(
    model: InferenceModel, examples: Sequence[Example], chunk: Chunk
) -> list[TeacherForcedScores]:
    states = model(chunk.rows, chunk.vision, read_only=True).flatten(0, 1)
    embeddings = states[chunk.rows.embedded_at].float().mean(dim=1).cpu().numpy()
    labels = chunk.rows.label_ids
    log_p, is_argmax = token_log_probs(
        model, states[chunk.rows.label_source], labels, _CHUNK_TOKENS
    )
    nll = -log_p.double().cpu().numpy()
    answers = _answers(model, labels.cpu().numpy(), nll, is_argmax.cpu().numpy())

    turns = [sum(m.role == "assistant" for d in e.dialogues for m in d) for e in examples]
    if len(answers) != sum(turns):
        raise DataError(
            f"examples {chunk.ids[0]!r} to {chunk.ids[-1]!r}: {sum(turns)} answers, but "
            f"{len(answers)} of the token {model.collator.pooled_token!r} that ends one; the chat "
            "template must write it after each answer"
        )
    ends = np.cumsum(turns)
    pairs = iter(range(chunk.pairs))
    scores = []
    for example, end, count in zip(examples, ends, turns, strict=True):
        pair = next(pairs) if example.query is not None else None
        scores.append(
            TeacherForcedScores(
                query=None if pair is None else embeddings[pair],
                target=None if pair is None else embeddings[chunk.pairs + pair],
                answers=tuple(answers[end - count : end]),
            )
        )
    return scores


def _answers(
    model: InferenceModel,
    labels: Int[np.ndarray, " l"],
    nll: Float[np.ndarray, " l"],
    greedy: Bool[np.ndarray, " l"],
) -> list[AnswerScore]:
    """Cut a chunk's labelled tokens into answers: each ends with the token that ends a turn."""
    end = model.processor.tokenizer.convert_tokens_to_ids(model.collator.pooled_token)
    stops = np.flatnonzero(labels == end) + 1
    return [
        AnswerScore(float(nll[begin:stop].sum()), int(stop - begin), bool(greedy[begin:stop].all()))
        for begin, stop in pairwise([0, *stops])
    ]
