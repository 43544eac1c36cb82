"""Captions: how surprising the reference is, and which things the model's own caption names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import numpy as np

from cafe.data.scenes import mentioned_kinds
from cafe.errors import DataError
from cafe.evaluate.data import Picture
from cafe.evaluate.scoring import Ratio
from cafe.evaluate.task import Generate, Read, Result
from cafe.evaluate.teacher_forced import Answer
from cafe.types import Conversation, Example

MAX_NEW_TOKENS = 64
"""Longer than any caption of the bundled world; a runaway caption is cut here."""


def caption(read: Read, generate: Generate, pictures: Sequence[Picture]) -> Result:
    """The caption loss, and the object scores where it is known what the pictures show."""
    loss = replace(caption_loss(read, pictures), ids=tuple(p.id for p in pictures))
    if any(picture.kinds is None for picture in pictures):
        return loss
    objects = caption_objects(generate, pictures)
    return replace(loss, items=loss.items | objects.items, ratios=loss.ratios | objects.ratios)


def caption_prompt(picture: Picture) -> Conversation:
    """What asks for a caption of `picture`: its first dialogue up to the answer."""
    return tuple(takewhile(lambda message: message.role != "assistant", picture.dialogues[0]))


def caption_loss(read: Read, pictures: Sequence[Picture]) -> Result:
    """Negative log-likelihood of the reference captions. Score: `caption_loss`, nats per token.

    Raises:
        DataError: what the collator raises.
    """
    examples = [Example(id=p.id, dialogues=p.dialogues) for p in pictures]
    return caption_loss_scores([reading.answers for reading in read(examples)])


def caption_loss_scores(captions: Sequence[Sequence[Answer]]) -> Result:
    """The same from what the model made of each picture's captions."""
    nats = np.array([sum(a.nll_nats for a in answers) for answers in captions])
    tokens = np.array([sum(a.tokens for a in answers) for answers in captions])
    return Result(
        len(captions),
        {"caption_nats": nats, "caption_tokens": tokens},
        {"caption_loss": Ratio("caption_nats", "caption_tokens")},
    )


def caption_objects(generate: Generate, pictures: Sequence[Picture]) -> Result:
    """Ask for a caption of each picture and compare the kinds of things named and shown.

    Scores: `caption_object_precision`, `…_recall`, `…_f1`, from counts summed over pictures.

    Raises:
        DataError: a picture of which nobody knows what it shows.
    """
    unknown = next((p.id for p in pictures if p.kinds is None), None)
    if unknown is not None:
        raise DataError(f"picture {unknown!r}: what it shows is not known; use a scenes folder")
    texts = generate([caption_prompt(picture) for picture in pictures], MAX_NEW_TOKENS)
    named = [mentioned_kinds(text) for text in texts]
    shown = [picture.kinds or frozenset() for picture in pictures]
    pairs = list(zip(named, shown, strict=True))
    items = {
        "objects_right": np.array([len(n & s) for n, s in pairs]),
        "objects_right_twice": np.array([2 * len(n & s) for n, s in pairs]),
        "objects_named": np.array([len(n) for n, _ in pairs]),
        "objects_shown": np.array([len(s) for _, s in pairs]),
        "objects_named_and_shown": np.array([len(n) + len(s) for n, s in pairs]),
    }
    ratios = {
        "caption_object_precision": Ratio("objects_right", "objects_named"),
        "caption_object_recall": Ratio("objects_right", "objects_shown"),
        "caption_object_f1": Ratio("objects_right_twice", "objects_named_and_shown"),
    }
    return Result(len(pictures), items, ratios)
