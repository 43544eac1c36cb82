"""Ask many short questions about pictures, paying for each picture once where that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cafe.evaluate.task import Generate, Read
from cafe.types import Conversation, Example, Image, Message, user


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a picture, and replies that the model is likely to give."""

    image: Image
    question: str
    likely: tuple[str, ...]

    @property
    def conversation(self) -> Conversation:
        return user(self.image, self.question)


def ask(read: Read, generate: Generate, asked: Sequence[Asked], max_new_tokens: int) -> list[str]:
    """The greedy reply to each question.

    All questions about one picture are read as branches of one row, each with its likely replies,
    which cost little more than their own tokens. If greedy decoding would write exactly one of
    them, that is the reply; only the other questions are really asked. (In low precision a near tie
    may fall either way, as it may between two batch sizes.)
    """
    of_picture: dict[object, list[int]] = {}
    for i, one in enumerate(asked):
        of_picture.setdefault(one.image.key, []).append(i)
    groups = list(of_picture.values())
    readings = read([_example(asked, group) for group in groups])
    replies: list[str | None] = [None] * len(asked)
    for group, reading in zip(groups, readings, strict=True):
        tried = [(i, text) for i in group for text in asked[i].likely]
        for (i, text), answer in zip(tried, reading.answers, strict=True):
            if answer.greedy:
                replies[i] = text
    other = [i for i, reply in enumerate(replies) if reply is None]
    if other:
        texts = generate([asked[i].conversation for i in other], max_new_tokens)
        for i, text in zip(other, texts, strict=True):
            replies[i] = text
    return [reply or "" for reply in replies]


def _example(asked: Sequence[Asked], group: Sequence[int]) -> Example:
    return Example(
        id=f"question {group[0]}",
        dialogues=tuple(
            (*asked[i].conversation, Message("assistant", (text,)))
            for i in group
            for text in asked[i].likely
        ),
    )
