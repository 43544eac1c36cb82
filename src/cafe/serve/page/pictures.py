"""Hits -> copies of their pictures that a browser may see.

No file of the index's folder is ever sent itself: what is sent is decoded, made smaller and encoded
again, so whatever else lies there (or hides in a picture's metadata) stays there.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from pathlib import Path, PurePath

from cafe.errors import DataError
from cafe.media import open_image
from cafe.types import Hit, Image

SMALL_PIXELS = 384 * 384
"""A picture of the gallery: sharp at two hundred points on a phone's dense screen."""

LARGE_PIXELS = 2_000_000
"""The picture that is asked about."""

REMEMBERED = 10_000


class Pictures:
    """Copies of the pictures below `root`, in `folder`.

    root   of the index's pictures; None: it has none that can be looked at
    """

    def __init__(self, root: Path | None, folder: Path) -> None:
        self._root = None if root is None else root.resolve()
        self._folder = folder
        self._originals: OrderedDict[str, Path] = OrderedDict()

    def small(self, hit: Hit) -> str | None:
        """The small copy's path; None for a hit without a picture that can be opened."""
        file = self._file(hit)
        if file is None:
            return None
        try:
            copy = self._copy(file, SMALL_PIXELS)
        except (DataError, OSError):
            return None
        self._originals[copy] = file
        while len(self._originals) > REMEMBERED:
            self._originals.popitem(last=False)
        return copy

    def large(self, small: str) -> str:
        """The copy to ask about, of a picture that `small` gave a copy of; else that copy."""
        file = self._originals.get(small)
        try:
            return small if file is None else self._copy(file, LARGE_PIXELS)
        except (DataError, OSError):
            return small

    def _file(self, hit: Hit) -> Path | None:
        """Inside the root, wherever its links lead: an index may come from somebody else."""
        name = hit.metadata.get("path")
        if self._root is None or not isinstance(name, str) or PurePath(name).is_absolute():
            return None
        file = (self._root / name).resolve()
        return file if file.is_relative_to(self._root) and file.is_file() else None

    def _copy(self, file: Path, pixels: int) -> str:
        """Raises ImageError for what is no picture."""
        what = f"{file}\0{file.stat().st_mtime_ns}\0{pixels}".encode()
        copy = self._folder / f"{hashlib.blake2b(what, digest_size=16).hexdigest()}.webp"
        if not copy.exists():
            begun = copy.with_suffix(f".{os.urandom(4).hex()}")
            open_image(Image(file, pixel_budget=pixels)).save(begun, "webp", quality=85)
            begun.replace(copy)
        return str(copy)
