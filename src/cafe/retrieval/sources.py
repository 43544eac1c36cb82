"""What `cafe embed` and `cafe index` read: one grammar for both.

    notes.txt          a red mug                    one text per line
    pairs.jsonl        {"id": "a", "text": "a red mug", "image": "mug.jpg"}
                       text or image may be missing
    photos/            every image in it, at any depth (`cafe.retrieval.folders`). For an index,
                       metadata.jsonl in it gives captions and columns:
                       {"file_name": "a.jpg", "text": "A red mug.", ...};
                       without it, a.txt beside a.jpg is its caption
                       For an index, PDFs (and .docx, .pptx where LibreOffice is) in it are images
                       of their pages, with their text layer (`cafe.retrieval.documents`)
    report.pdf         the same of one document, for an index
    captions.json, …   any other data set that `cafe train` reads (`cafe.data.tables`,
                       `cafe.data.formats`), as long as its records are texts, or images with or
                       without captions

Both commands accept all of these. What they make of a record differs, and may not change: results
of earlier runs are continued by id and by number.

                cafe embed (`open_source`)              cafe index (`list_items`)
    text and    are embedded together; a caption in     are one row per image: the image is
    image       another column is not embedded          embedded, the text is its caption
    id          an image's path (folders); else the     an image's path inside the folder; a
                record's `id`, its line number (.txt,   text's `id`, its line number (.txt), or
                .jsonl), or its name in the table       its name in the table
    hidden      images in a folder are embedded         are ignored
    order       as in the source, duplicates included   captions of one image are joined
    memory      one record at a time                    all items, undecoded

No image is opened here, and a broken record never stops the others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path, PurePath

from cafe.data.media_paths import MediaResolver, is_data_url
from cafe.data.read import check_image_columns
from cafe.data.records import Record
from cafe.data.tables import HUB, RawRecord, Table, open_table
from cafe.data.tables.captioned import caption_beside, caption_file
from cafe.data.tables.captions import caption_layout
from cafe.data.tables.text import LINES, text_lines
from cafe.documents import MAX_PAGES, is_document
from cafe.errors import DataError, quoted
from cafe.files import as_on_disk
from cafe.index import IndexItem, SkippedItem
from cafe.retrieval.documents import page_items
from cafe.retrieval.folders import FolderImages, FolderMetadata, folder_images
from cafe.retrieval.items import TEXT, columns_of, items_of, merged
from cafe.types import Image

TEXT_SUFFIX = ".txt"


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One input of `cafe embed`, its image still undecoded.

    location  where it stands, for messages
    path      of its image, if that is a file
    image     its image, if that is none: stored in a table or an archive
    """

    location: str
    id: str
    text: str | None = None
    path: Path | None = None
    image: Image | None = None


@dataclass(frozen=True, slots=True)
class SkippedRecord:
    """A broken input."""

    location: str
    reason: str


Entry = SourceRecord | SkippedRecord


@dataclass(frozen=True, slots=True)
class RecordSource:
    """What `cafe embed` reads.

    name      as the user wrote it
    origin    the same, absolute: what plans and tables keep
    root      where the paths of images start; None: there is no folder
    columns   which of text and path its records fill
    records   the records in order, from the first, each time it is called
    count     of all records, broken ones included
    left_out  files of a folder that are no images, by kind -> number of them
    """

    name: str
    origin: str
    root: Path | None
    columns: tuple[str, ...]
    records: Callable[[], Iterator[Entry]]
    count: int
    left_out: Counter[str] = field(default_factory=Counter)


def open_source(source: str | Path) -> RecordSource:
    """The records of `source`, to be embedded one by one.

    Raises:
        DataError: It has no records, cannot be read, or is of no known kind.
    """
    name, path = str(source), Path(source)
    suffix = "" if path.is_dir() else path.suffix.lower()
    if suffix in {TEXT_SUFFIX, *LINES} and not path.is_file():
        raise DataError(f"{path}: cannot be read (no such file)")
    root: Path | None = path if path.is_dir() else path.parent
    columns: tuple[str, ...] = ("text", "path")
    images = folder_images(path, hidden=True) if path.is_dir() else FolderImages()
    if images.names:
        columns, records = ("path",), partial(_folder_records, path, images.names)
    elif is_text_list(path):
        columns, records = ("text",), partial(_text_records, path)
    elif suffix in LINES:
        table = open_table(path)
        root = table.folder or path.parent
        check_image_columns(table, {}, MediaResolver(root))
        records = partial(_json_records, path, root)
    else:
        table = open_table(source)
        check_image_columns(table, {}, MediaResolver(table.folder))
        root, records = table.folder, partial(_table_records, table)
    count = sum(1 for _ in records())
    if not count:
        raise DataError(f"{source}: nothing to embed (it has no records)")
    left_out = images.left_out if images.names else Counter[str]()
    return RecordSource(name, _origin(name), root, columns, records, count, left_out)


def is_text_list(path: Path) -> bool:
    """Whether a file is one text per line, and not of images with captions.

    Raises:
        DataError: It cannot be read, or is no text.
    """
    is_text = path.suffix.lower() == TEXT_SUFFIX and not path.is_dir()
    return is_text and caption_layout(path) is None


def _origin(name: str) -> str:
    return name if name.startswith(HUB) else str(Path(name).absolute())


# ---------------------------------------------------------------------- records to embed


def _folder_records(folder: Path, files: list[str]) -> Iterator[Entry]:
    for name in files:
        yield SourceRecord(str(folder / name), name, path=folder / name)


def _text_records(path: Path) -> Iterator[Entry]:
    for number, line in _lines(path):
        location = f"{path}, line {number}"
        if isinstance(line, SkippedRecord):
            yield line
        elif not line.strip():
            yield SkippedRecord(location, "an empty line")
        else:
            yield SourceRecord(location, str(number), text=line)


def _json_records(path: Path, root: Path) -> Iterator[Entry]:
    media = MediaResolver(root)
    for number, line in _lines(path):
        location = f"{path}, line {number}"
        if isinstance(line, SkippedRecord):
            yield line
            continue
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield SkippedRecord(location, f"not JSON ({error})")
            continue
        yield from _records(RawRecord("", str(number), content), location, root, media)


def _table_records(table: Table) -> Iterator[Entry]:
    media = MediaResolver(table.folder)
    for raw in table.rows():
        content = raw.content
        if isinstance(content, dict):  # in a table, what is null is not there
            content = {name: value for name, value in content.items() if value is not None}
        location = f"{table.name}, {raw.location}"
        yield from _records(replace(raw, content=content), location, table.folder, media)


def _records(
    raw: RawRecord, location: str, folder: Path | None, media: MediaResolver
) -> Iterator[Entry]:
    try:
        yield from _inputs(raw, location, folder, media)
    except DataError as error:
        yield SkippedRecord(location, str(error))


def _inputs(
    raw: RawRecord, location: str, folder: Path | None, media: MediaResolver
) -> list[SourceRecord]:
    """What a record is to `cafe embed`: its text, its image, or both together.

    A record that has neither may be of one of the formats that `cafe index` reads.
    """
    record = raw.content
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, dict):
        raise DataError('expected an object such as {"text": ..., "image": ...}')
    text, image = record.get("text"), record.get("image")
    if text is not None and not isinstance(text, str):
        raise DataError(f"text is {quoted(text)}, expected a string")
    text = text if text and text.strip() else None
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if isinstance(image, list) or (text is None and not image):
        root = None if folder is None else folder.resolve()
        try:
            items = items_of(raw, location, media, root)
        except DataError as error:
            raise DataError(f"neither text nor image ({error})") from error
        return [_input_of(item, folder) for item in items]
    identity = str(record.get("id", raw.id))
    if not image:
        return [SourceRecord(location, identity, text)]
    if not isinstance(image, str) or is_data_url(image) or image.startswith("file://"):
        return [SourceRecord(location, identity, text, image=media.image(image))]
    if folder is None or PurePath(image).is_absolute() or ".." in PurePath(image).parts:
        raise DataError(f"image {quoted(image)} is outside the folder of the file")
    return [SourceRecord(location, identity, text, as_on_disk(folder / image))]


def _input_of(item: IndexItem, folder: Path | None) -> SourceRecord:
    """An item of an index as an input: an image without its caption, or a text."""
    if item.source is None:
        return SourceRecord(item.location, item.id, item.text)
    if item.path is None or folder is None:
        return SourceRecord(item.location, item.id, image=item.source)
    return SourceRecord(item.location, item.id, path=folder / item.path)


def _lines(path: Path) -> Iterator[tuple[int, str | SkippedRecord]]:
    """The lines of a text file (`text_lines`); one that is not UTF-8 is a broken input."""
    for number, line in text_lines(path):
        try:
            line.encode()
        except UnicodeEncodeError:
            yield number, SkippedRecord(f"{path}, line {number}", "not UTF-8 text")
        else:
            yield number, line


# ---------------------------------------------------------------------- items of an index


@dataclass(frozen=True, slots=True)
class Listing:
    """What an index of a source should hold.

    source    the folder or file, absolute, or the name of a data set
    root      where the images' paths start
    skipped   records that cannot be used, with the reasons
    left_out  files of a folder that are no images, by kind -> number of them
    """

    source: str
    root: Path | None
    items: list[IndexItem] = field(default_factory=list)
    skipped: list[SkippedItem] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def list_items(source: str, max_pages: int = MAX_PAGES) -> Listing:
    """Everything that an index of `source` should hold.

    Args:
        source: As the module says.
        max_pages: A document with more pages is skipped.

    Raises:
        DataError: There is nothing to index, or it cannot be read.
    """
    path = Path(source)
    images = FolderImages()
    if path.is_dir():
        images = folder_images(path, hidden=False, documents=True)
    if images.names or images.documents:
        listing = _folder(path, images, max_pages)
    elif path.is_file() and is_document(path):
        listing = Listing(_origin(source), path.parent.resolve())
        _list_document(path.parent, path.name, FolderMetadata(path.parent), max_pages, listing)
    elif is_text_list(path):
        listing = Listing(_origin(source), path.parent.resolve())
        _list_texts(path, listing)
    else:
        table = open_table(source)
        listing = Listing(_origin(source), None if table.folder is None else table.folder.resolve())
        _list_table(table, listing)
    if not listing.items:
        first = listing.skipped[0] if listing.skipped else None
        why = f"; the first of {len(listing.skipped)}: {first.reason}" if first else ""
        raise DataError(f"{source}: has nothing to index{why}")
    return listing


def _list_texts(path: Path, listing: Listing) -> None:
    for record in _text_records(path):
        if isinstance(record, SkippedRecord):
            listing.skipped.append(SkippedItem(record.location, record.reason))
        else:
            listing.items.append(IndexItem(record.location, record.id, text=record.text))


def _list_document(
    folder: Path, name: str, metadata: FolderMetadata, max_pages: int, listing: Listing
) -> None:
    try:
        records = metadata.of(name)
        listing.items.extend(page_items(folder / name, name, records, max_pages))
    except DataError as error:
        listing.skipped.append(SkippedItem(name, str(error)))


def _folder(folder: Path, images: FolderImages, max_pages: int) -> Listing:
    metadata = FolderMetadata(folder)
    captions = {caption_file(folder / name) for name in images.names if not metadata.of(name)}
    read = Counter(file.suffix.lower() for file in captions if file is not None)
    listing = Listing(str(folder.absolute()), folder.resolve(), left_out=images.left_out - read)
    listing.skipped.extend(metadata.skipped)
    media = MediaResolver(folder)
    documents = frozenset(images.documents)
    for name in sorted([*images.names, *documents]):
        if name in documents:
            _list_document(folder, name, metadata, max_pages, listing)
            continue
        records = metadata.of(name)
        try:
            source = media.image(name)
            records = metadata.of(name) or [{"text": caption_beside(folder / name)}]
        except DataError as error:
            listing.skipped.append(SkippedItem(name, str(error)))
            continue
        items = [_image_item(name, source, record) for record in records]
        listing.items.append(reduce(merged, items))
    listing.skipped.extend(metadata.unmatched())
    return listing


def _image_item(name: str, source: Image, record: Record) -> IndexItem:
    others = dict(record)
    text = next((t for k in TEXT if isinstance(t := others.pop(k, None), str)), None)
    return IndexItem(name, name, source, name, text, columns_of(others))


def _list_table(table: Table, listing: Listing) -> None:
    media = MediaResolver(table.folder)
    check_image_columns(table, {}, media)
    by_id: dict[str, int] = {}
    for raw in table.rows():
        location = f"{table.name}, {raw.location}"
        try:
            items = items_of(raw, location, media, listing.root)
        except DataError as error:
            listing.skipped.append(SkippedItem(location, str(error)))
            continue
        for item in items:
            again = by_id.get(item.id)
            if again is None or item.source is None:
                by_id[item.id] = len(listing.items)
                listing.items.append(item)
            else:
                listing.items[again] = merged(listing.items[again], item)
