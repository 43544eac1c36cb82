"""What a record of a data set means to an index: a text, or images with or without captions.

Any format of `cafe.data.formats` that has images with captions is read. An image's id is its path
inside the folder, or its name in the table; a text's is the record's id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cafe.data.columns import CAPTION, IMAGE
from cafe.data.formats import FORMATS, detect_format
from cafe.data.formats.captions import CAPTIONS
from cafe.data.media_paths import MediaResolver
from cafe.data.records import ReadOptions, Record
from cafe.data.tables import RawRecord
from cafe.errors import DataError
from cafe.index import IndexItem
from cafe.index.rows import column_name, plain
from cafe.types import Example, Image, StoredFile

TEXT = ("text", "caption")
"""Columns that hold a text, or the caption of an image."""

_OPTIONS = ReadOptions(mode="caption", language_loss=False)
_NO_TEXT = frozenset({*IMAGE, "images", "conversations", "messages", "video", "videos"})


def items_of(
    raw: RawRecord, location: str, media: MediaResolver, root: Path | None
) -> list[IndexItem]:
    """The rows of an index that a record becomes: a text, or one for each of its images.

    Args:
        raw: The record as it is stored.
        location: Where it stands, for messages.
        media: Finds its images.
        root: Where the paths of images start, symbolic links resolved; None: nowhere.

    Raises:
        DataError: It is neither a text nor images, or cannot be read.
    """
    record = raw.content
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, dict):
        raise DataError('expected an object such as {"text": ...} or {"image": ..., "text": ...}')
    own = record.get("id")
    identity = str(own) if isinstance(own, str | int) else raw.id
    text = next((t for k in TEXT if isinstance(t := record.get(k), str)), None)
    if text is not None and not any(record.get(name) for name in _NO_TEXT):
        if not text.strip():
            raise DataError("its text is empty")
        others = {k: v for k, v in record.items() if k not in {*TEXT, *_NO_TEXT, "id"}}
        return [IndexItem(location, identity, text=text, extra=columns_of(others))]
    if _is_uncaptioned(record):
        images = media.images(next(v for n in IMAGE if (v := record.get(n))))
        reading, captioned = CAPTIONS, [(identity, images, None)]
    else:
        reading = detect_format(record)
        if "caption" not in reading.modes:
            raise DataError(
                f"records of format {reading.name} have two sides; use images with captions, or "
                "texts"
            )
        examples = reading.read(identity, record, media, _OPTIONS)
        captioned = [_captioned(example) for example in examples]
    others = {k: v for k, v in record.items() if k not in reading.columns}
    if own is not None:
        others["record_id"] = str(own)
    return _of_images(captioned, location, root, columns_of(others))


def _is_uncaptioned(record: Record) -> bool:
    """Whether a record is of images of which nothing is said."""
    if not any(record.get(name) for name in IMAGE):
        return False
    for caption in (record.get(name) for name in CAPTION):
        if any(str(text or "").strip() for text in _as_list(caption)):
            return False
    named = frozenset(name for name, value in record.items() if value) | {"caption"}
    return [format for format in FORMATS.values() if format.fits(named)] == [CAPTIONS]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


Captioned = tuple[str, tuple[Image, ...], str | None]
"""An id, images, and their caption."""


def _captioned(example: Example) -> Captioned:
    parts = [part for message in example.query or () for part in message.content]
    images = tuple(part for part in parts if isinstance(part, Image))
    if not images:
        raise DataError("it shows a video, and only images are supported")
    return example.id, images, " ".join(message.text for message in example.target or ())


def _of_images(
    captioned: Sequence[Captioned], location: str, root: Path | None, extra: Mapping[str, Any]
) -> list[IndexItem]:
    items: dict[str, IndexItem] = {}
    for identity, images, text in captioned:
        for number, image in enumerate(images, 1):
            name = identity if len(images) == 1 else f"{identity}-{number}"
            id, path = _name(image, root, name)
            item = IndexItem(location, id, image, path, text, extra)
            items[id] = merged(items[id], item) if id in items else item
    return list(items.values())


def _name(image: Image, root: Path | None, fallback: str) -> tuple[str, str | None]:
    """The id of an image, and its path if it is a file."""
    match image.source:
        case Path() as path:
            inside = path.relative_to(root).as_posix() if root else str(path)
            return inside, inside
        case StoredFile() as stored:
            return stored.name, None
    return fallback, None


def merged(first: IndexItem, again: IndexItem) -> IndexItem:
    """One item of an image that is listed twice, with the captions of both."""
    captions = [text for text in (first.text, again.text) if text]
    known = (first.text or "").split("\n")
    text = first.text if again.text in known else "\n".join(captions) or None
    return replace(first, text=text, extra={**again.extra, **first.extra})


def columns_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The other columns of a record, as an index holds them."""
    return {column_name(name): plain(value) for name, value in record.items()}
