"""What `cafe index` reads: a folder of pictures, or any data set that `cafe train` reads.

    photos/            every picture in it, at any depth, but nothing hidden. metadata.jsonl in it
                       gives captions and columns: {"file_name": "a.jpg", "text": "A red mug.", ...}
    captions.json, …   pictures with captions (LLaVA, messages, image + caption); other columns are
                       kept. A picture that comes again is one row, with all of its captions
    notes.jsonl        {"id": "a", "text": "A red mug."}: records without a picture are texts

A picture's id is its path inside the folder; a text's is the record's id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cafe.data.formats import detect_format
from cafe.data.pictures import Media
from cafe.data.records import Meaning, Record
from cafe.data.tables import HUB, Raw, Table, open_table
from cafe.errors import DataError
from cafe.index import Item, Skipped
from cafe.index.rows import column_name, plain
from cafe.types import Example, Image
from cafe.types import Stored as StoredPicture

_MEANING = Meaning("caption", "conversation", False, "compress", "default")
_TEXT = ("text", "caption")
_NO_TEXT = frozenset(
    {"image", "images", "file_name", "conversations", "messages", "video", "videos"}
)
_METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True, slots=True)
class Listing:
    """What should be in the index.

    source  where it is from, as the index keeps it
    root    where the pictures' paths start
    """

    source: str
    root: Path | None
    items: list[Item] = field(default_factory=list)
    rejected: list[Skipped] = field(default_factory=list)


def list_items(source: str) -> Listing:
    """Everything that `source` names; no picture is opened.

    Raises DataError when there is nothing, or it cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        pictures = list(_pictures(path))
        if pictures:
            return _folder(path, pictures)
    table = open_table(source)
    name = source if source.startswith(HUB) else str(path.absolute())
    listing = Listing(name, None if table.folder is None else table.folder.resolve())
    _read_table(table, listing)
    if not listing.items:
        first = listing.rejected[0] if listing.rejected else None
        told = f"; the first of {len(listing.rejected)}: {first.reason}" if first else ""
        raise DataError(f"{source}: has nothing to index{told}")
    return listing


def _pictures(folder: Path) -> Iterator[str]:
    """Paths inside the folder, in order. Pillow's suffixes, so a README is no broken picture."""
    import PIL.Image

    suffixes = PIL.Image.registered_extensions()
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if file.suffix.lower() in suffixes and not hidden and file.is_file():
            yield inside.as_posix()


def _folder(folder: Path, pictures: list[str]) -> Listing:
    listing = Listing(str(folder.absolute()), folder.resolve())
    beside = _metadata(folder, listing)
    media = Media(folder)
    for name in pictures:
        try:
            source = media.image(name)  # a link may lead out of the folder
        except DataError as error:
            listing.rejected.append(Skipped(name, str(error)))
            continue
        record = dict(beside.get(name, {}))
        text = next((t for k in _TEXT if isinstance(t := record.pop(k, None), str)), None)
        listing.items.append(Item(name, name, source, name, text, _columns(record)))
    return listing


def _metadata(folder: Path, listing: Listing) -> dict[str, Record]:
    """The records of the folder's metadata file, by the picture that they are of."""
    for name in _METADATA:
        if (folder / name).is_file():
            break
    else:
        return {}
    found: dict[str, Record] = {}
    for raw in open_table(folder / name).rows():
        record = raw.content
        if isinstance(record, dict) and isinstance(record.get("file_name"), str):
            found[Path(record.pop("file_name")).as_posix()] = record
        else:
            reason = record if isinstance(record, DataError) else "has no file_name"
            listing.rejected.append(Skipped(f"{name}, {raw.place}", str(reason)))
    return found


def _read_table(table: Table, listing: Listing) -> None:
    media = Media(table.folder)
    by_id: dict[str, int] = {}
    for raw in table.rows():
        place = f"{table.name}, {raw.place}"
        try:
            items = _items(raw, place, media, listing.root)
        except DataError as error:
            listing.rejected.append(Skipped(place, str(error)))
            continue
        for item in items:
            again = by_id.get(item.id)
            if again is None or item.source is None:
                by_id[item.id] = len(listing.items)
                listing.items.append(item)
            else:
                listing.items[again] = _merged(listing.items[again], item)


def _items(raw: Raw, place: str, media: Media, root: Path | None) -> list[Item]:
    record = raw.content
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, dict):
        raise DataError('expected an object such as {"text": ...} or {"image": ..., "text": ...}')
    own = record.get("id")
    identity = str(own) if isinstance(own, str | int) else raw.id
    text = next((t for k in _TEXT if isinstance(t := record.get(k), str)), None)
    if text is not None and not any(record.get(name) for name in _NO_TEXT):
        if not text.strip():
            raise DataError("its text is empty")
        others = {k: v for k, v in record.items() if k not in {*_TEXT, *_NO_TEXT, "id"}}
        return [Item(place, identity, text=text, extra=_columns(others))]
    reading = detect_format(record)
    if "caption" not in reading.modes:
        raise DataError(
            f"records of format {reading.name} have two sides; index pictures with captions, or "
            "texts"
        )
    examples = reading.read(identity, record, media, _MEANING)
    others = {k: v for k, v in record.items() if k not in reading.columns}
    if own is not None:
        others["record_id"] = str(own)
    return _of_examples(examples, place, root, _columns(others))


def _of_examples(
    examples: tuple[Example, ...], place: str, root: Path | None, extra: Mapping[str, Any]
) -> list[Item]:
    items: dict[str, Item] = {}
    for example in examples:
        parts = [part for message in example.query or () for part in message.content]
        shown = [part for part in parts if isinstance(part, Image)]
        if not shown:
            raise DataError("it shows a video, and only pictures are indexed")
        text = " ".join(message.text for message in example.target or ())
        for number, image in enumerate(shown, 1):
            id, path = _name(
                image, root, example.id if len(shown) == 1 else f"{example.id}-{number}"
            )
            item = Item(place, id, image, path, text, extra)
            items[id] = _merged(items[id], item) if id in items else item
    return list(items.values())


def _name(image: Image, root: Path | None, otherwise: str) -> tuple[str, str | None]:
    """The id of a picture, and its path if it is a file."""
    match image.source:
        case Path() as path:
            inside = path.relative_to(root).as_posix() if root else str(path)
            return inside, inside
        case StoredPicture() as stored:
            return stored.name, None
    return otherwise, None


def _merged(first: Item, again: Item) -> Item:
    """A picture that comes twice: one item, with the captions of both."""
    captions = [text for text in (first.text, again.text) if text]
    known = (first.text or "").split("\n")
    text = first.text if again.text in known else "\n".join(captions)
    return replace(first, text=text, extra={**again.extra, **first.extra})


def _columns(record: Mapping[str, Any]) -> dict[str, Any]:
    return {column_name(name): plain(value) for name, value in record.items()}
