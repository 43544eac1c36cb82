"""How data sets name pictures and videos, and where these are."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from cafe.data.records import kind
from cafe.errors import DataError
from cafe.types import Image, Stored, Video

_PICTURE_NAME = re.compile(r"[^\n]{1,400}\.(jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)


class Media:
    """Finds pictures below one folder; a path that comes again is the same `Image`.

    root          None: there is no folder, so a path is an error
    pixel_budget  of a picture and of a frame, see `cafe.types.Image`
    Raises DataError when `root` is no folder.
    """

    def __init__(self, root: Path | None, pixel_budget: int | None = None) -> None:
        self._root = None if root is None else root.resolve()
        self._budget = pixel_budget
        self._known: dict[str, Image] = {}
        self._folders: dict[Path, Path] = {}
        if self._root is not None and not self._root.is_dir():
            raise DataError(f"image_root {str(root)!r}: no such folder")

    def images(self, value: object, field: str = "image") -> tuple[Image, ...]:
        """The pictures of a field that holds one, a list of them, or none."""
        values = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(self.image(one, field) for one in values)

    def videos(self, value: object, field: str = "video") -> tuple[Video, ...]:
        """The videos of a field that holds one, a list of them, or none."""
        values = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(self.video(one, field) for one in values)

    def image(self, value: object, field: str = "image") -> Image:
        """A picture: a path, a data URL, encoded bytes, `{"bytes", "path"}`, `{"url"}`, or stored.

        Raises DataError when it is something else, not there, or outside of the root.
        """
        match value:
            case str() if value.startswith("data:"):
                return Image(_decoded(value), self._budget)
            case str():
                if value not in self._known:
                    self._known[value] = Image(self._source(value, "picture"), self._budget)
                return self._known[value]
            case bytes() | Stored():
                return Image(value, self._budget)
            case {"bytes": bytes() as content}:
                return Image(content, self._budget)
            case {"path": str() as name} | {"url": str() as name}:
                return self.image(name, field)
            case _:
                raise DataError(f"{field!r} holds {kind(value)}, expected a path")

    def video(self, value: object, field: str = "video") -> Video:
        """A video, by its path. Raises DataError as `image` does."""
        if isinstance(value, dict):
            value = value.get("path") or value.get("url")
        if not isinstance(value, str):
            raise DataError(f"{field!r} holds {kind(value)}, expected a path")
        return Video(self._source(value, "video"), self._budget)

    def looks_like_picture(self, text: str) -> bool:
        """Whether a text that may also be a caption is the name of a picture.

        It must end like one; if it holds a blank, that file must be there.
        """
        if not _PICTURE_NAME.fullmatch(text):
            return False
        if " " not in text:
            return True
        try:
            return self._root is not None and (self._root / text).is_file()
        except (OSError, ValueError):
            return False

    # ------------------------------------------------------------------ paths

    def _source(self, name: str, what: str) -> Path:
        if name.startswith(("http://", "https://")):
            raise DataError(f"{what} {name!r} is on the network; download it and give its path")
        return self._path(unquote(name[7:]) if name.startswith("file://") else name, what)

    def _path(self, name: str, what: str) -> Path:
        if self._root is None:
            raise DataError(f"{what} {name!r}: set image_root to the folder where {what}s are")
        try:
            path = self._resolved(self._root / name)
            inside, exists = path.is_relative_to(self._root), path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, a link loop
            raise DataError(f"{what} {name!r}: not a path ({error})") from error
        if not inside:
            raise DataError(
                f"{what} {name!r} is outside {self._root}; move it there, or set image_root to a "
                f"folder that holds all {what}s"
            )
        if not exists:
            raise DataError(f"{what} {name!r}: no such file in {self._root}; put it there")
        return path

    def _resolved(self, path: Path) -> Path:
        """`path.resolve()`, which walks all folders, with one walk per folder."""
        if path.parent not in self._folders:
            self._folders[path.parent] = path.parent.resolve()
        path = self._folders[path.parent] / path.name
        return path.resolve() if path.is_symlink() else path


def _decoded(url: str) -> bytes:
    """The content of `data:image/png;base64,…`."""
    head, comma, body = url.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("no ;base64, in it")
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        raise DataError(f"picture {url[:40]!r}…: not a data URL ({error})") from error


def media_value(record: dict[str, Any], *names: str) -> Any:
    """The value of the first of the columns `names` that is not null."""
    return next((record[name] for name in names if record.get(name) is not None), None)
