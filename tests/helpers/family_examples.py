"""Examples that every family must read as transformers' own processor does, and how exactly."""

from __future__ import annotations

from typing import Any

from cafe.types import Conversation, Example, Image, Message, user
from helpers.images import noise

EXACT = 1e-6
A, B = Image(noise(1)), Image(noise(2))
WIDE, TALL = Image(noise(3, 90, 40)), Image(noise(4, 33, 120))


def turn(*content: Any) -> Conversation:
    *asked, answer = content
    return (Message("user", tuple(asked)), Message("assistant", (answer,)))


EXAMPLES = [
    Example("text only", query=user("a cat"), target=user("a red cat")),
    Example(
        "shared image",
        query=user(A),
        target=user("a cat"),
        dialogues=(turn(A, "Is it?", "yes"), turn(A, "Is it?", "yellow"), turn(A, "It?", "no")),
    ),
    Example("image in the target", query=user(WIDE, "which"), target=user("yes", TALL)),
    Example(
        "several images",
        query=user(A, B, "which"),
        target=user(B, A),
        negatives=(user(TALL), user("a dog")),
        dialogues=((*turn(A, "What?", "a cat"), *turn(WIDE, "\n\nAnd this?", "a dog")),),
    ),
    Example(
        "system",
        query=user(A, A, "same?"),
        target=(Message("system", ("Be brief.",)), *user("a cat")),
    ),
    Example("words only", dialogues=(turn("Why?", "so"), turn("Why not?", "so"))),
]
