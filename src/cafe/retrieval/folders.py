"""A folder of images: which of its files are images, what is left out, and their metadata.

    photos/a.jpg  photos/2024/b.heic  photos/IMG_0001     by suffix, or without one by content
    photos/metadata.jsonl                                 {"file_name": "a.jpg", "text": "A mug."}

Files that are no images are not errors, but they are counted: a format that is not read here would
otherwise be missing without a word.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cafe.data.records import Record
from cafe.data.tables import open_table
from cafe.documents import is_document
from cafe.errors import DataError, quoted
from cafe.files import as_on_disk, files_in
from cafe.index import SkippedItem
from cafe.media import image_suffixes, is_image_file

METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True, slots=True)
class FolderImages:
    """The images in a folder.

    names     their paths inside the folder, in order
    documents  paths of its PDFs, and Word and PowerPoint files, if they are asked for
    left_out  the other files, by kind (a suffix, "without suffix", "hidden") -> number of them
    """

    names: list[str] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def folder_images(folder: Path, *, hidden: bool, documents: bool = False) -> FolderImages:
    """The images inside `folder`, at any depth.

    Args:
        folder: Where to look.
        hidden: Include files whose name, or that of a folder on the way, begins with a dot.
        documents: List documents as such.
    """
    found = FolderImages()
    suffixes = image_suffixes()
    for path in files_in(folder):
        suffix = path.suffix.lower()
        shown = hidden or not any(part.startswith(".") for part in path.parts)
        if documents and shown and is_document(folder / path):
            found.documents.append(path.as_posix())
            continue
        image = suffix in suffixes or (not suffix and is_image_file(folder / path))
        if image and shown:
            found.names.append(path.as_posix())
        elif path.as_posix() not in METADATA:
            found.left_out["hidden images" if image else suffix or "without suffix"] += 1
    return found


class FolderMetadata:
    """The records of a folder's metadata file, by the image that they are of.

    A name also matches the file whose Unicode is composed otherwise (`cafe.files.as_on_disk`).
    """

    def __init__(self, folder: Path) -> None:
        self.skipped: list[SkippedItem] = []
        self._folder = folder
        self._file = next((name for name in METADATA if (folder / name).is_file()), None)
        self._records: dict[str, list[tuple[str, Record]]] = {}
        for location, record in self._read():
            name = Path(record.pop("file_name")).as_posix()
            self._records.setdefault(name, []).append((location, record))
        self._spelled = {unicodedata.normalize("NFC", name): name for name in self._records}
        self._used: set[str] = set()

    def of(self, image: str) -> list[Record]:
        """The records of an image, by its path inside the folder."""
        name = image
        if name not in self._records:
            name = self._spelled.get(unicodedata.normalize("NFC", image), image)
        self._used.add(name)
        return [record for _, record in self._records.get(name, ())]

    def unmatched(self) -> Iterator[SkippedItem]:
        """The records whose image has not been asked for."""
        for name, records in self._records.items():
            there = name not in self._used and as_on_disk(self._folder / name).is_file()
            reason = "is not one of the folder's images" if there else "no such file in the folder"
            if name not in self._used:
                for location, _ in records:
                    yield SkippedItem(location, f"image {quoted(name)}: {reason}")

    def _read(self) -> Iterator[tuple[str, Record]]:
        if self._file is None:
            return
        for raw in open_table(self._folder / self._file).rows():
            record, location = raw.content, f"{self._file}, {raw.location}"
            if isinstance(record, dict) and isinstance(record.get("file_name"), str):
                yield location, record
            else:
                reason = record if isinstance(record, DataError) else "has no file_name"
                self.skipped.append(SkippedItem(location, str(reason)))
