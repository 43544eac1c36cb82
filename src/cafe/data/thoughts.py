"""Thoughts: what a model says of an image before the image's embedding is read (think-then-embed).

A thought comes from the records themselves, or from a file of JSON lines that `cafe think` wrote,
one for each example that has one:

    {"id": "000001", "image": "000001.png", "query": "A big cat at the top left.", "target": null,
     "model": "tiny"}

`image` is the file that it is about, so that thoughts are not taken for those of other records with
the same ids; a file that was written by hand may leave it out, and `model` too. The side of a pair
that is thought about is asked for a description and followed by it: the same conversation that
`CAFe.encode(think=…)` embeds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from cafe.data.records import kind, numbered_lines
from cafe.errors import DataError, check_unicode
from cafe.types import Conversation, Example, Image, StoredFile, thought_about

ANSWERS = "answers"
"""In a recipe: the thought is the first answer about the image."""

MISSING = "examples without a thought, embedded as they are"


class ThoughtKey(NamedTuple):
    """What a thought belongs to: an example's id, and the name of its image, if it has one."""

    id: str
    image: str | None


@dataclass(frozen=True, slots=True)
class Thoughts:
    """The thoughts about the two sides of one pair; None: there is none.

    model   what wrote them, as it was named
    """

    query: str | None = None
    target: str | None = None
    model: str | None = None

    @property
    def empty(self) -> bool:
        return self.query is None and self.target is None


def thought_key(example: Example) -> ThoughtKey:
    sides = (example.query or (), example.target or ())
    parts = (part for side in sides for message in side for part in message.content)
    for part in parts:
        if not isinstance(part, Image):
            continue
        match part.source:
            case str() | Path():
                return ThoughtKey(example.id, Path(part.source).name)
            case StoredFile():
                return ThoughtKey(example.id, part.source.name.rpartition("/")[2])
            case _:
                break
    return ThoughtKey(example.id, None)


def check_ids(examples: Iterable[Example], name: str) -> None:
    """Raises DataError where several examples have the same id and no file tells them apart."""
    seen: set[ThoughtKey] = set()
    for example in examples:
        key = thought_key(example)
        if key in seen and key.image is None:
            raise DataError(
                f"{name}: several examples have the id {key.id!r}, so their thoughts cannot be "
                "told apart; give each record an id of its own"
            )
        seen.add(key)


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
        DataError: the file cannot be read, a line of it is no thought or is about another image, or
            no example has a thought.
    """
    written = None if source == ANSWERS else _Written.read(Path(source), examples)
    result: list[Example] = []
    found = 0
    for example in examples:
        if example.query is None or example.target is None:
            result.append(example)
            continue
        own = _answered(example) if written is None else written.of(example)
        if own.empty:
            changes[MISSING] += 1  # not += False, which would be reported as 0 records
        found += not own.empty
        result.append(
            replace(
                example,
                query_thought=_followed(example.query, own.query),
                target_thought=_followed(example.target, own.target),
            )
        )
    if found:
        return result
    raise DataError(
        f"data.*.thoughts: answers: none of the {len(examples)} examples is a pair with an image "
        "and an answer about it (language_loss: false leaves answers out); name a file that "
        "`cafe think` wrote"
        if written is None
        else f"data.*.thoughts: {source}: none of the {len(examples)} examples has one there; the "
        "ids must be those of the examples: write it anew with `cafe think`"
    )


def read_thoughts(path: Path) -> dict[ThoughtKey, Thoughts]:
    """The thoughts of a file. An empty thought is none.

    Raises:
        DataError: the file cannot be read, or a line of it is not a thought, or another one than an
            earlier line has of the same example; names the line.
    """
    found: dict[ThoughtKey, Thoughts] = {}
    for number, line in numbered_lines(path):
        key, thoughts = _parsed(line, f"{path}, line {number}")
        if found.setdefault(key, thoughts) != thoughts:
            raise DataError(
                f"{path}, line {number}: another thought about {key.id!r} than an earlier line "
                "has; keep one of them"
            )
    return found


def thought_line(key: ThoughtKey, thoughts: Thoughts) -> str:
    """One line of the file, with its newline."""
    record = {
        **key._asdict(),
        "query": thoughts.query,
        "target": thoughts.target,
        "model": thoughts.model,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def _parsed(line: str, location: str) -> tuple[ThoughtKey, Thoughts]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: is not JSON; write it anew with `cafe think`") from error
    if not isinstance(record, dict) or not isinstance(record.get("id"), str):
        raise DataError(f'{location}: expected {{"id": …, "query": …}}, found {kind(record)}')
    values: dict[str, str | None] = {}
    for name in ("query", "target", "image", "model"):
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{location}: {name!r} is {kind(value)}, expected text or null")
        if value is not None:
            try:
                check_unicode(value)
            except DataError as error:
                raise DataError(f"{location}: {name!r}: {error}") from error
        values[name] = value.strip() or None if value else None
    image = values.pop("image")
    return ThoughtKey(record["id"], image), Thoughts(**values)


@dataclass(frozen=True, slots=True)
class _Written:
    """The thoughts of a file, found by id and image; by id alone where a line names no image."""

    path: Path
    thoughts: dict[ThoughtKey, Thoughts]
    images: dict[str, str | None]

    @classmethod
    def read(cls, path: Path, examples: Sequence[Example]) -> _Written:
        try:
            thoughts = read_thoughts(path)
        except DataError as error:
            hint = "" if path.is_file() else f"; give a file, or {ANSWERS}"
            raise DataError(f"data.*.thoughts: {error}{hint}") from error
        check_ids((e for e in examples if e.query is not None), str(path))
        return cls(path, thoughts, {key.id: key.image for key in thoughts})

    def of(self, example: Example) -> Thoughts:
        key = thought_key(example)
        found = self.thoughts.get(key) or self.thoughts.get(ThoughtKey(key.id, None))
        if found is None and key.image is not None and self.images.get(key.id) is not None:
            raise DataError(
                f"data.*.thoughts: {self.path}: the thought of {key.id!r} is about "
                f"{self.images[key.id]}, and the example shows {key.image}; the data have changed: "
                "write it anew with `cafe think`"
            )
        return found or Thoughts()


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
