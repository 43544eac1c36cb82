"""A folder of images or recordings, each with its caption in a text file of the same name.

    photos/mug.jpg      photos/mug.txt          A red mug on a table.
    photos/mug.v2.jpg   photos/mug.v2.txt       only the last suffix differs

Formats know such a record as one of an image folder's metadata: `file_name`, `caption`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cafe.audio import AUDIO_SUFFIXES
from cafe.data.records import RawRecord, Table, cannot_be_read
from cafe.data.tables.splits import BUILDERS
from cafe.data.tables.text import encoding_of
from cafe.errors import DataError
from cafe.files import as_on_disk, files_in
from cafe.media import IMAGE_SUFFIXES

CAPTIONS = (".txt", ".caption")
MAX_TEXT_BYTES = 16 * 2**20
"""A text with more belongs to no image: a log, or an archive by a wrong name."""


def captioned_folder(folder: Path) -> Table | None:
    """The images of a folder with their captions.

    None where no image has a text file of its name, or there are as many files of records. A few
    such files beside captions (a list of licences, boxes) are not what the folder is about.
    """
    files = files_in(folder)
    images = [file for file in files if file.suffix[1:].lower() in IMAGE_SUFFIXES | AUDIO_SUFFIXES]
    captions = sum(caption_file(folder / image) is not None for image in images)
    if captions <= sum(file.suffix.lower() in BUILDERS for file in files):
        return None

    def rows() -> Iterator[RawRecord]:
        for image in images:
            name = image.as_posix()
            try:
                caption = caption_beside(folder / image)
                if caption is None:
                    raise DataError(f"it has no caption; write it to {image.stem}.txt")
            except DataError as error:
                yield RawRecord(name, name, error)
            else:
                yield RawRecord(name, name, {"file_name": name, "caption": caption})

    return Table(str(folder), folder, frozenset({"file_name", "caption"}), rows)


def caption_beside(image: Path) -> str | None:
    """The text of the file that lies beside an image and has its name, but for the suffix.

    Raises:
        DataError: It cannot be read, is not text, or is too large for a caption.
    """
    text = caption_file(image)
    if text is None:
        return None
    try:
        if (size := text.stat().st_size) > MAX_TEXT_BYTES:
            raise too_large(text.name, size)
        return text.read_text(encoding_of(text)).strip()
    except UnicodeError as error:
        raise DataError(f"{text.name} is not UTF-8 text") from error
    except OSError as error:
        raise cannot_be_read(text.name, error) from error


def caption_file(image: Path) -> Path | None:
    """The text file beside an image, with its name but for the suffix."""
    files = (as_on_disk(image.with_suffix(suffix)) for suffix in CAPTIONS)
    return next((file for file in files if file.is_file()), None)


def too_large(name: str, size: int) -> DataError:
    """What is said of a text that is not read."""
    return DataError(
        f"{name} has {size:,} bytes, and a text at most {MAX_TEXT_BYTES:,}; cut or remove it"
    )
