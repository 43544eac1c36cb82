"""Open images safely: decode, bound, orient, convert to RGB, fit to a pixel budget.

Every image, from a training file or a request, passes through `open_image`, so a
decompression bomb or a truncated file is one clear error everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from cafe.errors import ImageError, quoted
from cafe.files import LFS_POINTER, is_lfs_pointer
from cafe.image_cost import excess, excess_of_tags
from cafe.types import Image, StoredFile, Video

MAX_PIXELS = 89_000_000
"""Largest image that is decoded (width x height), just below the size at which Pillow warns."""

MAX_ASPECT_RATIO = 200
"""Image processors fail in obscure ways beyond it."""

IMAGE_SUFFIXES = frozenset(
    [
        "jpg",
        "jpeg",
        "jfif",
        "jpe",
        "png",
        "webp",
        "gif",
        "bmp",
        "tif",
        "tiff",
        "avif",
        "heic",
        "heif",
        "jp2",
        "ppm",
    ]
)
"""What the names of image files end with, where a name must tell images from texts."""

_HEIF = re.compile(rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)
_CONTENT = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|....ftypavi[fs]",
    re.DOTALL,
)
_HEAD_BYTES = 16


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of files that Pillow opens, alone or with pillow-heif, with their dots."""
    return frozenset(PIL.Image.registered_extensions()) | {".heic", ".heif"}


def is_image_file(path: Path) -> bool:
    """Whether a file begins as an image of a common format does, whatever its name."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    return bool(_CONTENT.match(head) or _HEIF.match(head))


def open_image(image: Image, *, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Decode `image` to RGB, upright (EXIF orientation applied), within its `pixel_budget`.

    Args:
        image: The image to open.
        max_pixels: A lower limit, if needed; Pillow itself rejects twice `MAX_PIXELS` and more.

    Raises:
        ImageError: naming the file, when it is missing, not an image, truncated, empty, larger than
            `max_pixels`, or one side is longer than `MAX_ASPECT_RATIO` times the other.
    """
    with _opened(image, max_pixels) as opened:
        decoded = _to_rgb(_upright(opened))
        budget = image.pixel_budget
        return decoded if budget is None else _smaller(decoded, budget)


def image_size(image: Image) -> tuple[int, int]:
    """Width and height of what `open_image` returns, without decoding it.

    Raises:
        ImageError: as `open_image`, but an image whose data are damaged has a size.
    """
    with _opened(image, MAX_PIXELS) as opened:
        width, height = opened.size
        if opened.getexif().get(PIL.ExifTags.Base.Orientation) in _LYING:
            width, height = height, width
        budget = image.pixel_budget
        return (width, height) if budget is None else fitting_size(width, height, budget)


_LYING = {5, 6, 7, 8}
"""EXIF orientations that exchange width and height."""


@contextlib.contextmanager
def _opened(image: Image, max_pixels: int) -> Iterator[PIL.Image.Image]:
    """A context with the image, its header read and checked; its errors become `ImageError`s."""
    source = image.source
    name = _name(source)
    try:
        # Closed here: an image that fails half way is held by its traceback, and its file with it.
        with contextlib.ExitStack() as files:
            if isinstance(source, PIL.Image.Image):
                opened = source
            else:
                content = source.read() if isinstance(source, StoredFile) else source
                _check_cost(name, content)
                if isinstance(content, bytes):
                    opened = _pillow_image(name, io.BytesIO(content))
                else:
                    opened = _pillow_image(name, files.enter_context(Path(content).open("rb")))
            _check_size(name, *opened.size, max_pixels)
            _refuse(name, excess_of_tags(opened.info.get("exif") or b""))
            if image.pixel_budget is not None and opened is not source:
                # A JPEG is decoded directly at 1/2, 1/4 or 1/8.
                opened.draft(None, fitting_size(*opened.size, image.pixel_budget))
            yield opened
    except ImageError:
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ImageError(f"{name}: no such file") from error
    except PIL.UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image in a format that Pillow reads") from error
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: far too large ({error}); make it smaller") from error
    except Exception as error:  # decoders of broken files raise any exception
        raise ImageError(f"{name}: cannot be decoded ({error}); replace or remove it") from error


def fitting_size(width: int, height: int, pixel_budget: int) -> tuple[int, int]:
    """The largest size of the same aspect ratio within `pixel_budget` pixels; sides are at least 1.

    An image that fits keeps its size.
    """
    if width * height <= pixel_budget:
        return width, height
    scale = math.sqrt(pixel_budget / (width * height))
    new_width, new_height = max(1, int(width * scale)), max(1, int(height * scale))
    # A side rounded up to 1 leaves fewer pixels for the other.
    return (
        max(1, min(new_width, pixel_budget // new_height)),
        max(1, min(new_height, pixel_budget // new_width)),
    )


def _smaller(image: PIL.Image.Image, pixel_budget: int) -> PIL.Image.Image:
    size = fitting_size(*image.size, pixel_budget)
    return image if size == image.size else image.resize(size, PIL.Image.Resampling.BICUBIC)


def _name(source: object) -> str:
    match source:
        case str() | Path():
            return f"image {quoted(str(source))}"
        case StoredFile():
            return f"image {quoted(source.name)}"
        case _:
            return "image"


def _pillow_image(name: str, file: BinaryIO) -> PIL.Image.Image:
    """The image, not decoded yet. HEIC, as phones write it, is read where pillow-heif is."""
    try:
        return PIL.Image.open(file)
    except PIL.UnidentifiedImageError:
        file.seek(0)
        if not _HEIF.match(file.read(_HEAD_BYTES)):
            raise
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImageError(
            f"{name}: reading HEIC needs pillow-heif; pip install pillow-heif"
        ) from error
    register_heif_opener()
    file.seek(0)
    return PIL.Image.open(file)


def _check_cost(name: str, content: bytes | str | Path) -> None:
    if isinstance(content, bytes):
        reason = LFS_POINTER if is_lfs_pointer(content) else excess(content)
    else:
        with Path(content).open("rb") as file:
            try:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (ValueError, OSError):  # an empty file, or no file of a disk
                return
            with mapped:
                reason = LFS_POINTER if is_lfs_pointer(mapped[:64]) else excess(mapped)
    _refuse(name, reason)


def _refuse(name: str, reason: str | None) -> None:
    if reason is not None:
        fix = "" if reason == LFS_POINTER else "; save it anew"
        raise ImageError(f"{name}: {reason}{fix}")


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    turned = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1
    return PIL.ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Transparent images are composited on white, as viewers show them."""
    image.load()
    if image.mode.startswith("I;16"):
        # Pillow would clip 65,535 levels at 255, which leaves only white.
        image = image.convert("I").point(lambda level: level / 257).convert("L")
    if image.mode in {"I", "F"}:
        image = _scaled(image)
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = PIL.Image.new("RGBA", rgba.size, "white")
        return PIL.Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(image: PIL.Image.Image) -> PIL.Image.Image:
    """A 32-bit image as 8-bit grey: what fits 8 or 16 bits by these, else by its own range.

    Numbers that are not finite count as 0.
    """
    levels = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    low, high = float(levels.min()), float(levels.max())
    if low >= 0 and image.mode == "F" and high <= 1:
        high, low = 1.0, 0.0
    elif low >= 0 and high <= 65_535:
        high, low = (255.0 if high <= 255 else 65_535.0), 0.0
    grey = (levels - low) * (255 / max(high - low, 1e-300))
    return PIL.Image.fromarray(grey.round().astype(np.uint8))


def _check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    if min(width, height) < 1:
        raise ImageError(f"{name}: {width}x{height} is empty; replace or remove it")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width}x{height} pixels exceed the limit of {max_pixels:,}; make it smaller"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(f"{name}: {width}x{height} is longer than {MAX_ASPECT_RATIO}:1; crop it")


@dataclass(frozen=True, slots=True)
class Clip:
    """Sampled frames of a video.

    frames    RGB, in order
    indices   their numbers among all frames of the video
    total     number of frames of the video
    fps       of the video; None: unknown
    """

    frames: tuple[PIL.Image.Image, ...]
    indices: tuple[int, ...]
    total: int
    fps: float | None = None


def open_video(video: Video, max_frames: int) -> Clip:
    """At most `max_frames` frames of a video, evenly spaced: the middles of equal parts.

    Raises:
        ImageError: naming the file, when it is missing, cannot be decoded or has no frames, or when
            PyAV, which reads video files, is not installed.
    """
    if isinstance(video.source, tuple):
        total = len(video.source)
        if not total:
            raise ImageError("video: it has no frames; replace or remove it")
        indices = evenly_spaced(total, max_frames)
        budget = video.pixel_budget
        frames = tuple(open_image(Image(video.source[i], budget)) for i in indices)
        return Clip(frames, indices, total)
    path = Path(video.source)
    if not path.is_file():
        raise ImageError(f"video {quoted(str(path))}: no such file")
    return _decoded(str(path), path.stat().st_mtime_ns, max_frames, video.pixel_budget)


def evenly_spaced(total: int, count: int) -> tuple[int, ...]:
    """The middles of `count` equal parts of range(total); all of it if total <= count."""
    count = min(total, count)
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))


@functools.lru_cache(maxsize=4)
def _decoded(path: str, modified_ns: int, max_frames: int, pixel_budget: int | None) -> Clip:
    """Cached: a video in several prompts of a batch is decoded once and has identical frames."""
    name = f"video {path!r}"
    try:
        import av  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImageError(f"{name}: reading video files needs PyAV; pip install av") from error
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise ImageError(f"{name}: it has no frames, only sound; replace or remove it")
            stream = container.streams.video[0]
            total = stream.frames or sum(1 for _ in container.decode(stream))
            container.seek(0)
            indices = evenly_spaced(total, max_frames)
            wanted = set(indices)
            decoded = {}
            for i, frame in enumerate(container.decode(stream)):
                if i in wanted:
                    decoded[i] = open_image(Image(frame.to_image(), pixel_budget))
                if len(decoded) == len(wanted):
                    break
            rate = stream.average_rate
    except ImageError:
        raise
    except Exception as error:  # decoders of broken files raise any exception
        raise ImageError(f"{name}: cannot be decoded ({error}); replace or remove it") from error
    if not decoded:
        raise ImageError(f"{name}: it has no frames; replace or remove it")
    # A file may contain fewer frames than it declares.
    frames = tuple(decoded[i] for i in sorted(decoded))
    return Clip(frames, tuple(sorted(decoded)), total, float(rate) if rate else None)
