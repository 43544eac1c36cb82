"""Free descriptions of pictures, block by block, each kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Sequence

from cafe.evaluate.journal import Journal
from cafe.evaluate.task import Generate
from cafe.types import Image, user

PICTURES_AT_ONCE = 64


def describe(
    generate: Generate,
    pictures: Sequence[tuple[str, Image]],
    prompt: str,
    max_new_tokens: int,
    journal: Journal | None = None,
) -> list[str]:
    """What the model says to `prompt` about each (id, picture), in order.

    Descriptions that the journal has are not generated again.
    """
    journal = journal or Journal()
    keys = [("describe", prompt, max_new_tokens, id) for id, _ in pictures]
    missing = [i for i, key in enumerate(keys) if key not in journal]
    for start in range(0, len(missing), PICTURES_AT_ONCE):
        block = missing[start : start + PICTURES_AT_ONCE]
        texts = generate([user(pictures[i][1], prompt) for i in block], max_new_tokens)
        for i, text in zip(block, texts, strict=True):
            journal.put(keys[i], text)
    return [journal[key] for key in keys]
