"""A document and its pages: opened late, page by page, and told apart by the file's bytes."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from cafe.documents import office
from cafe.documents.renderer import count_pages, page_text, render_page
from cafe.errors import DataError, ImageError, quoted
from cafe.types import StoredFile

PAGE_PIXELS = 1_000_000
"""Size of a page's image unless another is chosen: about 100 dots per inch of an A4 page."""

MAX_PAGES = 1000
"""Pages of a document that is read, unless another limit is chosen."""

PDF_SUFFIX = ".pdf"
_BEGIN = b"%PDF-"
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Document:
    """A document that can be read.

    path     of the file
    pages    number of them
    digest   blake2b of the file's bytes
    """

    path: Path
    pages: int
    digest: str

    def page(self, number: int, pixels: int = PAGE_PIXELS) -> StoredPage:
        """Page `number`, from 1, as an image of at most `pixels` pixels."""
        return StoredPage(self.path, number, pixels, self.digest)


@dataclass(frozen=True, slots=True)
class StoredPage(StoredFile):
    """A page of a document as an image, which is drawn each time that it is read.

    number   from 1
    pixels   of the image, at most
    digest   of the file's bytes when it was listed; None: not known
    """

    path: Path
    number: int
    pixels: int = PAGE_PIXELS
    digest: str | None = None

    @property
    def name(self) -> str:
        return f"{self.path}, page {self.number}"

    @property
    def fingerprint(self) -> bytes | None:
        """What the image is made of: the file's bytes, the number, and the size."""
        if self.digest is None:
            return None
        return f"page {self.number} of {self.digest} at {self.pixels}".encode()

    def read(self) -> bytes:
        """The page as a PPM file. Raises ImageError when it cannot be drawn."""
        try:
            return render_page(pdf_of(self.path), self.number, self.pixels)
        except DataError as error:
            raise ImageError(f"image {quoted(self.name)}: {error}") from error

    def text(self) -> str | None:
        """The page's text layer; None where there is none, as in a scan.

        Raises:
            ImageError: It cannot be read.
        """
        try:
            return page_text(pdf_of(self.path), self.number) or None
        except DataError as error:
            raise ImageError(f"image {quoted(self.name)}: {error}") from error


def documents_readable() -> bool:
    """Whether the library that reads PDFs is installed."""
    return importlib.util.find_spec("pypdfium2") is not None


def is_document(path: Path) -> bool:
    """Whether a file is one, by its suffix; without a suffix, by how it begins."""
    suffix = path.suffix.lower()
    if suffix:
        return suffix == PDF_SUFFIX or suffix in office.SUFFIXES
    try:
        with path.open("rb") as file:
            return file.read(len(_BEGIN)) == _BEGIN
    except OSError:
        return False


def open_document(path: Path, max_pages: int = MAX_PAGES) -> Document:
    """Look at a document: how many pages it has, and which file it is.

    Raises:
        DataError: without the file's name: it is encrypted, broken, without pages, or has more than
            `max_pages`; the file cannot be read; or what reads it is not installed.
    """
    if not documents_readable():
        raise DataError("reading documents needs pypdfium2; pip install 'cafe-vlm[documents]'")
    digest = _digest(path)
    pages = count_pages(pdf_of(path, digest))
    if pages > max_pages:
        raise DataError(f"has {pages:,} pages, and {max_pages:,} are the limit; raise max_pages")
    return Document(path, pages, digest)


def pdf_of(path: Path, digest: str | None = None) -> Path:
    """The PDF of a document: the file itself, or what LibreOffice made of it.

    Args:
        path: The document.
        digest: Of its bytes, if known.

    Raises:
        DataError: without the file's name: it cannot be converted.
    """
    if path.suffix.lower() not in office.SUFFIXES:
        return path
    return office.converted(path, digest or _digest(path))


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES))
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from error
    return found.hexdigest()
