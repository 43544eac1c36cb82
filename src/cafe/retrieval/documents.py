"""Pages of documents as items of an index, and hits as pages again.

A page is an image whose id is "report.pdf#page=3", whose `path` is that of the document, and whose
number is in the column `page`. Its text is the document's own text layer. Which rows are up to date
is told by the document's bytes: one that did not change is neither drawn nor read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cafe.data.records import Record
from cafe.documents import MAX_PAGES, PAGE_PIXELS, StoredPage, documents_readable, open_document
from cafe.errors import CafeError, DataError
from cafe.index import Index, IndexItem
from cafe.retrieval.items import columns_of
from cafe.types import Hit, Image

PAGE = "page"
"""The column with a page's number, from 1."""


def page_items(
    file: Path, name: str, records: Iterable[Record] = (), max_pages: int = MAX_PAGES
) -> list[IndexItem]:
    """One item for each page of a document.

    Args:
        file: The document.
        name: Its path inside the folder that is indexed.
        records: What is known of it: columns that all of its pages have.
        max_pages: A document with more is not read.

    Raises:
        DataError: without the file's name: it cannot be read, or has too many pages.
    """
    columns: dict[str, Any] = {}
    for record in records:
        columns = {**columns_of(record), **columns}
    document = open_document(file, max_pages)
    return [
        IndexItem(
            f"{name}, page {number}",
            f"{name}#page={number}",
            Image(document.page(number)),
            name,
            extra={**columns, PAGE: number},
        )
        for number in range(1, document.pages + 1)
    ]


def at_size(items: Sequence[IndexItem], pixels: int) -> list[IndexItem]:
    """The items, with pages of at most `pixels` pixels."""
    return [_at_size(item, pixels) for item in items]


def _at_size(item: IndexItem, pixels: int) -> IndexItem:
    page = None if item.source is None else item.source.source
    if not isinstance(page, StoredPage):
        return item
    return replace(item, source=Image(replace(page, pixels=pixels)))


def has_pages(items: Iterable[IndexItem]) -> bool:
    """Whether one of the items is a page of a document."""
    return any(item.source and isinstance(item.source.source, StoredPage) for item in items)


def size_of_pages(index: Index | None, asked: int | None) -> int:
    """The size of the pages' images: what is asked for, else as in the index, else `PAGE_PIXELS`.

    Raises:
        DataError: It is not positive.
        CafeError: The index has pages, and what reads documents is no longer installed: they would
            be deleted.
    """
    origin = None if index is None else index.origin
    before = None if origin is None else origin.page_pixels
    if before is not None and not documents_readable():
        raise CafeError(
            "the index has pages of documents, and reading them needs pypdfium2: "
            "pip install 'cafe-vlm[documents]'"
        )
    if asked is not None and asked < 1:
        raise DataError(f"page_pixels={asked}: give the size of a page's image, 1 pixel or more")
    return asked or before or PAGE_PIXELS


def page_number(hit: Hit) -> int | None:
    """Which page of its document a hit is, from 1; None: it is none.

    The data of an index without documents may have a column of the same name.
    """
    number = hit.metadata.get(PAGE)
    is_page = isinstance(number, int) and hit.id == f"{hit.metadata.get('path')}#page={number}"
    return number if is_page else None


def location_of(hit: Hit, file: str | None = None) -> str:
    """Where a hit stands, for people: its file and page, or its id.

    Args:
        hit: The hit.
        file: What its file is called; None: as inside the indexed folder.
    """
    name = file or str(hit.metadata.get("path") or hit.id)
    number = page_number(hit)
    return name if number is None else f"{name}, page {number}"


def hit_image(hit: Hit, file: Path, pixels: int | None = None) -> Image:
    """The image of a hit: its file, or the page of it.

    Args:
        hit: The hit.
        file: Of its image, or its document.
        pixels: Size of the image, at most; None: an image's own, a page's usual one.
    """
    number = page_number(hit)
    if number is None:
        return Image(file, pixel_budget=pixels)
    return Image(StoredPage(file, number, pixels or PAGE_PIXELS))
