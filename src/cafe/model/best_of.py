"""Several answers, of which the model's own embedding chooses the most faithful.

One set of weights writes and embeds: an answer that names what is not in the picture lies farther
from the picture than one that does not, as far as the model has learnt to retrieve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.nn import functional

from cafe.errors import DataError
from cafe.model import inference
from cafe.model.prompts import DEFAULT_PROMPT
from cafe.types import Conversation, Image, Message, Video, user

if TYPE_CHECKING:
    from cafe.model.vlm import CAFe


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer and the cosine of its embedding to that of the conversation's pictures."""

    text: str
    similarity: float


def candidates(
    model: CAFe,
    conversations: Sequence[Conversation],
    samples: int,
    max_new_tokens: int,
    batch_size: int,
    sampling: dict[str, Any],
) -> list[list[Candidate]]:
    """For each conversation its distinct answers, the nearest first.

    They are the greedy answer and `samples` sampled ones; of equally near ones the greedy is the
    first, then the first sampled. An empty answer comes last.

    sampling   as for `CAFe.generate`
    Raises DataError for a conversation without a picture; ValueError for samples < 1, and for
    settings that do not sample.
    """
    if samples < 1:
        raise ValueError(f"best_of={samples}: sample at least one answer")
    if sampling.get("do_sample", True) is False:
        raise ValueError("best_of samples its answers: leave do_sample out")
    shown = [_shown(c, n) for n, c in enumerate(conversations)]
    greedy = inference.generate(model, conversations, max_new_tokens, batch_size, {})
    # Copies of a conversation stand side by side, so its picture is seen once in a batch.
    copies = [c for c in conversations for _ in range(samples)]
    sampled = inference.generate(
        model, copies, max_new_tokens, batch_size, {**sampling, "do_sample": True}
    )
    texts = [
        list(dict.fromkeys([greedy[i], *sampled[i * samples : (i + 1) * samples]]))
        for i in range(len(conversations))
    ]
    embeddings = functional.normalize(
        inference.encode(
            model,
            [*shown, *(user(text) for own in texts for text in own)],
            batch_size,
            DEFAULT_PROMPT,
        ),
        dim=1,
    )
    pictures, answers = embeddings[: len(shown)], embeddings[len(shown) :]
    ranked, begin = [], 0
    for picture, own in zip(pictures, texts, strict=True):
        similarities = (answers[begin : begin + len(own)] @ picture).tolist()
        begin += len(own)
        found = [Candidate(text, s) for text, s in zip(own, similarities, strict=True)]
        ranked.append(sorted(found, key=lambda c: (c.text == "", -c.similarity)))
    return ranked


def _shown(conversation: Conversation, number: int) -> Conversation:
    """The pictures and videos of a conversation, alone."""
    parts = [
        part
        for message in conversation
        for part in message.content
        if isinstance(part, Image | Video)
    ]
    if not parts:
        raise DataError(
            f"input {number}: best_of compares answers with a picture, and there is none"
        )
    return (Message("user", tuple(parts)),)
