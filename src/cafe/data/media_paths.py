"""Images, videos and recordings as records name them, resolved to files below a root."""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from cafe.data.quarantine import NO_SUCH_FILE
from cafe.data.records import kind
from cafe.errors import DataError, quoted
from cafe.files import as_on_disk, inside
from cafe.types import Audio, Image, StoredFile, Video

_IMAGE_NAME = re.compile(
    r"[^\n]{1,400}\.(jpe?g|jfif|jpe|png|webp|gif|bmp|tiff?|avif|heic|heif|jp2|ppm)", re.IGNORECASE
)
_DATA_URL = re.compile(r"data:[^\s,]{0,200};\s*base64\s*[;,]", re.IGNORECASE)


class MediaResolver:
    """Finds images below one folder; equal paths give the same `Image` object.

    Also counts in `changes` what formats change in the records of one data set, by what it is.

    Args:
        root: The folder; None: there is none, so a path is an error.
        pixel_budget: Of each image and frame, see `cafe.types.Image`.
        max_seconds: Of each recording, see `cafe.types.Audio`.
        fix: What to do about a file that is missing.

    Raises:
        DataError: `root` is not a folder.
    """

    def __init__(
        self,
        root: Path | None,
        pixel_budget: int | None = None,
        fix: str = "put it there",
        max_seconds: float | None = None,
    ) -> None:
        self._root = None if root is None else root.resolve()
        self._budget = pixel_budget
        self._seconds = max_seconds
        self._fix = fix
        self._known: dict[str, Image] = {}
        self._heard: dict[str, Audio] = {}
        self.changes: Counter[str] = Counter()
        self._walked: dict[Path, Path] = {}
        if self._root is not None and not self._root.is_dir():
            raise DataError(f"image_root {str(root)!r}: no such folder")

    def images(self, value: object, field: str = "image") -> tuple[Image, ...]:
        """The images of a field that contains one, a list of them, or none."""
        return tuple(self.image(one, field) for one in _given(value))

    def videos(self, value: object, field: str = "video") -> tuple[Video, ...]:
        """The videos of a field that contains one, a list of them, or none."""
        return tuple(self.video(one, field) for one in _given(value))

    def image(self, value: object, field: str = "image") -> Image:
        """An image: a path, a data URL, encoded bytes, `{"bytes", "path"}`, `{"url"}`, or stored.

        Raises DataError when it is something else, missing, or outside of the root.
        """
        match value:
            case str() if is_data_url(value):
                return Image(_decoded(value), self._budget)
            case str():
                if value not in self._known:
                    self._known[value] = Image(self._source(value, "image"), self._budget)
                return self._known[value]
            case bytes() | StoredFile():
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

    def recordings(self, value: object, field: str = "audio") -> tuple[Audio, ...]:
        """The recordings of a field that contains one, a list of them, or none."""
        return tuple(self.recording(one, field) for one in _given(value))

    def recording(self, value: object, field: str = "audio") -> Audio:
        """A recording: a path, a data URL, encoded bytes, stored, or as a library writes it.

        `{"bytes", "path"}` and `{"array", "sampling_rate"}` are those of `datasets`, and
        `{"data", "format"}`, in base64, OpenAI's. Raises DataError as `image` does.
        """
        match value:
            case str() if is_data_url(value):
                return Audio(_decoded(value, "audio"), max_seconds=self._seconds)
            case str():
                if value not in self._heard:
                    source = self._source(value, "audio file")
                    self._heard[value] = Audio(source, max_seconds=self._seconds)
                return self._heard[value]
            case bytes() | StoredFile():
                return Audio(value, max_seconds=self._seconds)
            case {"bytes": bytes() as content}:
                return Audio(content, max_seconds=self._seconds)
            case {"array": list() as samples, "sampling_rate": int() as rate}:
                return Audio(np.asarray(samples, dtype=np.float32), rate, self._seconds)
            case {"data": str() as data, "format": str() as kind_of}:
                url = f"data:audio/{kind_of};base64,{data}"
                return Audio(_decoded(url, "audio"), max_seconds=self._seconds)
            case {"path": str() as name} | {"url": str() as name}:
                return self.recording(name, field)
        raise DataError(f"{field!r} holds {kind(value)}, expected the path of an audio file")

    def looks_like_image(self, text: str) -> bool:
        """Whether a text that may also be a caption is the name of an image.

        It ends like one, also before the query of an address, or it is a data URL. A caption that
        ends so is an image that is missing, which is said, rather than an image taken for a text.
        """
        if _DATA_URL.match(text):
            return True
        if text.startswith(("http://", "https://")) and not re.search(r"\s", text):
            try:
                text = urlsplit(text).path
            except ValueError:
                return False
        return bool(_IMAGE_NAME.fullmatch(text))

    def is_text(self, value: object) -> bool:
        """Whether a value is words: several of them, and neither an image's name nor a file."""
        if not isinstance(value, str) or len(value.split()) < 2 or self.looks_like_image(value):
            return False
        try:
            return self._root is None or not (self._root / value).is_file()
        except (OSError, ValueError):
            return True

    # ------------------------------------------------------------------ paths

    def _source(self, name: str, what: str) -> Path:
        if name.startswith(("http://", "https://")):
            raise DataError(
                f"{what} {quoted(name)} is on the network; download it and give its path"
            )
        return self._path(unquote(name[7:]) if name.startswith("file://") else name, what)

    def _path(self, name: str, what: str) -> Path:
        if self._root is None:
            raise DataError(
                f"{what} {quoted(name)}: set image_root to the folder where {what}s are"
            )
        try:
            path = inside(self._root, name, self._walked)
        except ValueError as error:
            problem = _no_base64(name) or f"not a path ({error})"
            raise DataError(f"{what} {quoted(name)}: {problem}") from error
        if path is None:
            raise DataError(
                f"{what} {quoted(name)} is outside {self._root}; move it there, or set "
                f"image_root to a folder that holds all {what}s"
            )
        path = as_on_disk(path)
        if not path.is_file():
            if problem := _no_base64(name):
                raise DataError(f"{what} {quoted(name)}: {problem}")
            raise DataError(f"{what} {quoted(name)}{NO_SUCH_FILE}{self._root}; {self._fix}")
        return path


def is_data_url(text: str) -> bool:
    """Whether a text is `data:…`; the case of the scheme means nothing."""
    return text[:5].lower() == "data:"


def _no_base64(name: str) -> str | None:
    """What is wrong with a name that is in truth an image in base64; None: it is not one."""
    if not re.fullmatch(r"[A-Za-z0-9+/\s]{300,}=*\s*", name):
        return None
    return "no path; if it is base64, write data:image/png;base64, in front of it"


def _decoded(url: str, what: str = "image") -> bytes:
    """The content of `data:image/png;base64,…`."""
    head, comma, body = url.partition(",")
    try:
        if not comma or "base64" not in [part.strip().lower() for part in head.split(";")[1:]]:
            raise ValueError("no ;base64, in it")
        return base64.b64decode("".join(body.split()), validate=True)  # MIME's lines are short
    except (ValueError, binascii.Error) as error:
        raise DataError(f"{what} {quoted(url, 40)}: not a data URL ({error})") from error


def media_value(record: dict[str, Any], *names: str) -> Any:
    """The value of the first of the columns `names` that holds something, or is not null."""
    values = [record[name] for name in names if record.get(name) is not None]
    return next((v for v in values if not _is_empty(v)), values[0] if values else None)


def _given(value: object) -> list[Any]:
    """What a field holds: nothing, one, or a list, in which what is empty is not there."""
    values = value if isinstance(value, list) else [value]
    return [one for one in values if not _is_empty(one)]


def _is_empty(value: object) -> bool:
    """Whether a value means none: null, no text, an empty list, a stored image without content."""
    match value:
        case None | b"":
            return True
        case str():
            return not value.strip()
        case [] | {"bytes": None, "path": None | ""}:
            return True
    return False
