"""Names of the columns that hold images and captions, and where images lie that a table names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from cafe.data.media_paths import MediaResolver
from cafe.data.records import Table

IMAGE = ("image", "file_name", "image_name")
"""Columns that hold an image or its path, the first filled one counts (`image_name`: Flickr30k)."""

AUDIO = ("audio", "audios")
"""Columns that hold a recording or its path."""

CAPTION = ("caption", "captions", "text", "comment")
"""Columns that hold a caption or several (`comment`: Flickr30k)."""

_FOLDERS = (
    "Images",
    "images",
    "flickr30k_images",
    "flickr30k-images",
    "Flicker8k_Dataset",  # as published
    "Flickr8k_Dataset",
)
_PROBED = 5  # records whose images are looked for
_NAMES = MediaResolver(None)


def is_image_name(value: object) -> bool:
    """Whether a value is a text that names an image: it ends like one, or is a data URL."""
    return isinstance(value, str) and _NAMES.looks_like_image(value)


def image_folder(folder: Path, names: Sequence[str], others: Iterable[Path] = ()) -> Path:
    """Where images lie that a file in `folder` names.

    Args:
        folder: The folder of the file; returned where no folder holds any of the images.
        names: The first of the names.
        others: More folders to look in, after those in which data sets usually keep images.

    Returns:
        The first folder that holds one of them.
    """
    for candidate in (folder, *(folder / name for name in _FOLDERS), *others):
        if any(_is_file(candidate / name) for name in names):
            return candidate
    return folder


def with_image_folder(table: Table) -> Table:
    """The table, its images where those that it names first are (`image_folder`)."""
    if table.folder is None:
        return table
    names: list[str] = []
    for raw in islice(table.rows(), _PROBED):
        record = raw.content if isinstance(raw.content, dict) else {}
        values: Iterable[Any] = (record.get(column) for column in (*IMAGE, "images"))
        names += [v[0] if isinstance(v, list) else v for v in values if v]
    return replace(table, folder=image_folder(table.folder, [n for n in names if _is_path(n)]))


def _is_path(value: object) -> bool:
    return is_image_name(value) and not str(value).startswith(("data:", "http://", "https://"))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no possible name of a file
        return False
