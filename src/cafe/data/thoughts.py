"""Thoughts: what a model says of an image before the image's embedding is read (think-then-embed).

A thought comes from the records themselves, or from a file of JSON lines that `cafe think` wrote,
one for each example that has one:

    {"id": "000001", "query": "A big cat at the top left.", "target": null}

The side of a pair that is thought about is asked for a description and followed by it: the same
conversation that `CAFe.encode(think=…)` embeds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cafe.data.records import cannot_be_read, kind
from cafe.errors import DataError
from cafe.types import Conversation, Example, Image, thought_about

ANSWERS = "answers"
"""In a recipe: the thought is the first answer about the image."""

MISSING = "examples without a thought, embedded as they are"


@dataclass(frozen=True, slots=True)
class Thoughts:
    """The thoughts about the two sides of one pair; None: there is none."""

    query: str | None = None
    target: str | None = None


def shows_images_only(side: Conversation | None) -> bool:
    """Whether a side of a pair is one that is thought about by default."""
    parts = [part for message in side or () for part in message.content]
    return bool(parts) and all(isinstance(part, Image) for part in parts)


def with_thoughts(examples: Sequence[Example], source: str, changes: Counter[str]) -> list[Example]:
    """The examples with the thoughts that a recipe names.

    Args:
        examples: of one data source.
        source: "answers", or the path of a file.
        changes: counts the pairs that have no thought.

    Raises:
        DataError: the file cannot be read, a line of it is no thought, or no example has one.
    """
    written = None if source == ANSWERS else read_thoughts(Path(source))
    result: list[Example] = []
    found = 0
    for example in examples:
        if example.query is None or example.target is None:
            result.append(example)
            continue
        own = _answered(example) if written is None else written.get(example.id, Thoughts())
        if own.query is None and own.target is None:
            changes[MISSING] += 1
        else:
            found += 1
        result.append(
            replace(
                example,
                query_thought=_followed(example.query, own.query),
                target_thought=_followed(example.target, own.target),
            )
        )
    if not found:
        where = "its dialogues have no answers about the image" if written is None else source
        raise DataError(
            f"thoughts: {source}: none of the {len(examples)} examples has one ({where}); the ids "
            "of the file must be those of the examples: write it anew with `cafe think`"
        )
    return result


def read_thoughts(path: Path) -> dict[str, Thoughts]:
    """Id of an example -> its thoughts. An empty thought is none.

    Raises:
        DataError: the file cannot be read, or a line of it is no thought; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise cannot_be_read(path, error) from error
    return dict(
        _parsed(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    )


def thought_line(identity: str, thoughts: Thoughts) -> str:
    """One line of the file, with its newline."""
    record = {"id": identity, "query": thoughts.query, "target": thoughts.target}
    return json.dumps(record, ensure_ascii=False) + "\n"


def _parsed(line: str, location: str) -> tuple[str, Thoughts]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{location}: is not JSON; write the file anew with `cafe think`"
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("id"), str):
        raise DataError(f'{location}: expected {{"id": …, "query": …}}, found {kind(record)}')
    for side in ("query", "target"):
        value = record.get(side)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{location}: {side!r} is {kind(value)}, expected text or null")
    return record["id"], Thoughts(record.get("query"), record.get("target"))


def _answered(example: Example) -> Thoughts:
    """The first answer of the first dialogue, about the sides that are images."""
    answers = (m.text for turns in example.dialogues for m in turns if m.role == "assistant")
    answer = next(answers, None)
    return Thoughts(
        answer if shows_images_only(example.query) else None,
        answer if shows_images_only(example.target) else None,
    )


def _followed(side: Conversation, thought: str | None) -> Conversation | None:
    return thought_about(side, thought) if thought and thought.strip() else None
