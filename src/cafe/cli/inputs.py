"""What `cafe embed` reads: a text file, a JSONL file, or a folder of pictures.

    notes.txt        a red mug                                    id "1", "2", … (line numbers)
    pairs.jsonl      {"id": "a", "text": "a red mug", "image": "mug.jpg"}
                     text or image may be missing; without an id, the line number is the id
    photos/          every picture in it, at any depth            id is the path inside the folder

Inputs come in blocks that fit in memory. A broken input never stops the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import PIL.Image

from cafe.errors import DataError
from cafe.media import open_image
from cafe.types import Image

MAX_BLOCK_INPUTS = 4096
"""So many that the model can sort a block by length, few enough to see progress."""

MAX_BLOCK_PIXELS = 200_000_000
"""Decoded pictures of one block take at most three bytes times this, plus one picture."""


@dataclass(frozen=True, slots=True)
class Record:
    """One input, pictures still undecoded. `place` says where it stands, for messages."""

    place: str
    id: str
    text: str | None = None
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A record whose picture is decoded; `value` is what the model's `encode` takes."""

    place: str
    id: str
    text: str | None
    path: Path | None
    value: Any


@dataclass(frozen=True, slots=True)
class Skipped:
    """A broken input."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where records come from, how many there are, and which columns they fill."""

    records: Callable[[], Iterator[Record | Skipped]]
    count: int
    columns: tuple[str, ...]

    def blocks(self) -> Iterator[tuple[list[Loaded], list[Skipped]]]:
        """Loaded records and broken ones, a memory's worth at a time, in order."""
        return blocks_of(self.records())


def blocks_of(
    records: Iterable[Record | Skipped],
) -> Iterator[tuple[list[Loaded], list[Skipped]]]:
    """Records, loaded, and broken ones, a memory's worth at a time, in order."""
    block: list[Loaded] = []
    problems: list[Skipped] = []
    pixels = 0
    for record in records:
        loaded = record if isinstance(record, Skipped) else _load(record)
        if isinstance(loaded, Skipped):
            problems.append(loaded)
        else:
            block.append(loaded)
            pixels += _pixels(loaded.value)
        if len(block) + len(problems) >= MAX_BLOCK_INPUTS or pixels >= MAX_BLOCK_PIXELS:
            yield block, problems
            block, problems, pixels = [], [], 0
    if block or problems:
        yield block, problems


def open_source(path: Path) -> Source:
    """Find out what `path` is. Raises DataError when it is none of the three."""
    if path.is_dir():
        # Pillow's list of suffixes, so a README or a label file is not taken for a picture.
        suffixes = PIL.Image.registered_extensions()
        files = sorted(
            file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file()
        )
        if not files:
            raise DataError(f"{path}: no pictures in this folder")
        return Source(lambda: _from_folder(path, files), len(files), ("path",))
    readers = {".txt": (_from_text, ("text",)), ".jsonl": (_from_json, ("text", "path"))}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: expected a .txt file, a .jsonl file, or a folder of pictures")
    try:
        with path.open("rb") as lines:
            count = sum(1 for _ in lines)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    read, columns = readers[path.suffix.lower()]
    return Source(lambda: read(path), count, columns)


def _from_folder(folder: Path, files: list[Path]) -> Iterator[Record]:
    for file in files:
        yield Record(str(file), file.relative_to(folder).as_posix(), path=file)


def _from_text(path: Path) -> Iterator[Record | Skipped]:
    for number, line in _lines(path):
        place = f"{path}, line {number}"
        if isinstance(line, Skipped):
            yield line
        elif not line.strip():
            yield Skipped(place, "an empty line")
        else:
            yield Record(place, str(number), text=line)


def _from_json(path: Path) -> Iterator[Record | Skipped]:
    for number, line in _lines(path):
        place = f"{path}, line {number}"
        yield line if isinstance(line, Skipped) else _parse(line, place, str(number), path.parent)


def _parse(line: str, place: str, number: str, folder: Path) -> Record | Skipped:
    try:
        record = json.loads(line)
    except ValueError as error:
        return Skipped(place, f"not JSON ({error})")
    if not isinstance(record, dict):
        return Skipped(place, 'expected an object such as {"text": ..., "image": ...}')
    text, image = record.get("text"), record.get("image")
    for key, value in (("text", text), ("image", image)):
        if value is not None and not isinstance(value, str):
            return Skipped(place, f"{key} is {value!r}, expected a string")
    text = text if text and text.strip() else None
    if text is None and not image:
        return Skipped(place, "neither text nor image")
    if image and (PurePath(image).is_absolute() or ".." in PurePath(image).parts):
        return Skipped(place, f"picture {image!r} is outside the folder of the file")
    return Record(place, str(record.get("id", number)), text, folder / image if image else None)


def _lines(path: Path) -> Iterator[tuple[int, str | Skipped]]:
    """Lines without their ends, numbered from 1; one that is not UTF-8 is a broken input."""
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                yield number, Skipped(f"{path}, line {number}", "not UTF-8 text")
            else:
                yield number, line


def _load(record: Record) -> Loaded | Skipped:
    try:
        f"{record.id}{record.text or ''}{record.path or ''}".encode()
    except UnicodeEncodeError:  # of JSON's escapes, or of a file name's bytes
        return Skipped(record.place, "half a surrogate pair is no text")
    value: Any = record.text
    if record.path is not None:
        try:
            picture = open_image(Image(record.path))
        except DataError as error:
            # In a folder the place is the picture: its name once is enough.
            reason = str(error).removeprefix(f"picture {record.place!r}: ")
            return Skipped(record.place, reason)
        value = picture if record.text is None else {"text": record.text, "image": picture}
    return Loaded(record.place, record.id, record.text, record.path, value)


def _pixels(value: Any) -> int:
    picture = value["image"] if isinstance(value, dict) else value
    return picture.width * picture.height if isinstance(picture, PIL.Image.Image) else 0
