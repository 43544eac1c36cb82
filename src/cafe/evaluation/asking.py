"""What tasks ask a model about images: short questions, and free descriptions.

Questions about one image share its tokens where that is possible (`ask`); descriptions are long,
so each block of them is kept as soon as it has been generated (`describe`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cafe.evaluation.journal import Journal
from cafe.evaluation.task import Generate, ScoreExamples
from cafe.types import Conversation, Example, Image, Message, user

IMAGES_PER_BLOCK = 64
"""Images in a block of descriptions."""


@dataclass(frozen=True, slots=True)
class VisualQuestion:
    """A question about an image, and likely replies."""

    image: Image
    question: str
    likely: tuple[str, ...]

    @property
    def conversation(self) -> Conversation:
        return user(self.image, self.question)


def ask(
    score_examples: ScoreExamples,
    generate: Generate,
    asked: Sequence[VisualQuestion],
    max_new_tokens: int,
) -> list[str]:
    """The greedy reply to each question.

    All questions about one image are branches of one row, each with its likely replies, which cost
    little more than their own tokens. If greedy decoding would write exactly one of them, that is
    the reply; a reply is generated only for the other questions. (In low precision a near tie may
    fall either way, as it may between two batch sizes.)
    """
    of_image: dict[object, list[int]] = {}
    for i, one in enumerate(asked):
        of_image.setdefault(one.image.key, []).append(i)
    groups = list(of_image.values())
    scored = score_examples([_example(asked, group) for group in groups])
    replies: list[str | None] = [None] * len(asked)
    for group, scores in zip(groups, scored, strict=True):
        tried = [(i, text) for i in group for text in asked[i].likely]
        for (i, text), answer in zip(tried, scores.answers, strict=True):
            if answer.greedy:
                replies[i] = text
    other = [i for i, reply in enumerate(replies) if reply is None]
    if other:
        texts = generate([asked[i].conversation for i in other], max_new_tokens)
        for i, text in zip(other, texts, strict=True):
            replies[i] = text
    return [reply or "" for reply in replies]


def describe(
    generate: Generate,
    images: Sequence[tuple[str, Image]],
    prompt: str,
    max_new_tokens: int,
    journal: Journal | None = None,
) -> list[str]:
    """The model's reply to `prompt` about each (id, image), in order.

    Descriptions in the journal are not generated again.
    """
    journal = journal or Journal()
    keys = [("describe", prompt, max_new_tokens, id) for id, _ in images]
    missing = [i for i, key in enumerate(keys) if key not in journal]
    for start in range(0, len(missing), IMAGES_PER_BLOCK):
        block = missing[start : start + IMAGES_PER_BLOCK]
        texts = generate([user(images[i][1], prompt) for i in block], max_new_tokens)
        for i, text in zip(block, texts, strict=True):
            journal.put(keys[i], text)
    return [journal[key] for key in keys]


def _example(asked: Sequence[VisualQuestion], group: Sequence[int]) -> Example:
    return Example(
        id=f"question {group[0]}",
        dialogues=tuple(
            (*asked[i].conversation, Message("assistant", (text,)))
            for i in group
            for text in asked[i].likely
        ),
    )
