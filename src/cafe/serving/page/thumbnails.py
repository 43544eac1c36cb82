"""Copies of the hits' images, for the browser.

No file of the index's folder is sent itself: an image is decoded, scaled down and encoded again, so
other files (and the metadata of images) stay private.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path

from cafe.errors import DataError
from cafe.files import inside, replacing
from cafe.media import open_image
from cafe.retrieval.documents import hit_image, page_number
from cafe.types import Hit

SMALL_PIXELS = 384 * 384
"""Pixels of an image in the gallery: sharp at 200 points on a high-density screen."""

LARGE_PIXELS = 2_000_000
"""Pixels of the image to ask about."""

MAX_ORIGINALS = 10_000
"""Number of copies whose original is remembered."""


class Thumbnails:
    """Makes copies of images.

    root     folder of the index's images; None: it has no files that can be shown
    folder   of the copies
    """

    def __init__(self, root: Path | None, folder: Path) -> None:
        self._root = root
        self._folder = folder
        self._originals: OrderedDict[str, tuple[Hit, Path]] = OrderedDict()

    def small(self, hit: Hit) -> str | None:
        """Path of a small copy; None for a hit without an image that can be opened."""
        file = self._file(hit)
        if file is None:
            return None
        try:
            copy = self._copy(hit, file, SMALL_PIXELS)
        except (DataError, OSError):
            return None
        self._originals[copy] = hit, file
        while len(self._originals) > MAX_ORIGINALS:
            self._originals.popitem(last=False)
        return copy

    def hit_of(self, small: str) -> Hit | None:
        """The hit that `small` is a copy of."""
        original = self._originals.get(small)
        return None if original is None else original[0]

    def large(self, small: str) -> str:
        """Path of a larger copy of the image that `small` is a copy of; else `small` itself."""
        original = self._originals.get(small)
        try:
            return small if original is None else self._copy(*original, LARGE_PIXELS)
        except (DataError, OSError):
            return small

    def _file(self, hit: Hit) -> Path | None:
        """The hit's file, if its name stays inside the root (`cafe.files.inside`).

        An untrusted index may contain any path.
        """
        name = hit.metadata.get("path")
        if self._root is None or not isinstance(name, str):
            return None
        try:
            file = inside(self._root, name)
        except ValueError:
            return None
        return file if file is not None and file.is_file() else None

    def _copy(self, hit: Hit, file: Path, pixels: int) -> str:
        """Raises ImageError for a file that is not an image, or a page that cannot be drawn."""
        page = page_number(hit)
        identity = f"{file}\0{page}\0{file.stat().st_mtime_ns}\0{pixels}".encode()
        copy = self._folder / f"{hashlib.blake2b(identity, digest_size=16).hexdigest()}.webp"
        if not copy.exists():
            image = open_image(hit_image(hit, file, pixels))
            with replacing(copy) as unfinished:
                image.save(unfinished, "webp", quality=85)
        return str(copy)
