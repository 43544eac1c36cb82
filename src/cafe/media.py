"""Open pictures safely: decode, bound, orient, convert to RGB, fit to a pixel budget.

Every picture, from a training file or a request, passes through `open_image`, so a
decompression bomb or a truncated file is one clear error everywhere.
"""

from __future__ import annotations

import functools
import io
import math
from dataclasses import dataclass
from pathlib import Path

import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from cafe.errors import ImageError
from cafe.types import Image, Stored, Video

MAX_PIXELS = 89_000_000
"""Largest picture that is decoded (width x height), just below where Pillow begins to warn."""

MAX_ASPECT_RATIO = 200
"""Image processors fail in obscure ways beyond it."""


def open_image(image: Image, *, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Decode `image` to RGB, upright (EXIF orientation applied), within its `pixel_budget`.

    max_pixels   a smaller bound, if wanted; Pillow itself refuses twice `MAX_PIXELS` and more
    Raises ImageError, naming the file, when it is missing, not a picture, truncated, empty,
    larger than `max_pixels` or longer than `MAX_ASPECT_RATIO` times its width.
    """
    source = image.source
    name = _name(source)
    try:
        if isinstance(source, PIL.Image.Image):
            picture = source
        else:
            content = source.read() if isinstance(source, Stored) else source
            picture = PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
        _check_size(name, *picture.size, max_pixels)
        if image.pixel_budget is None:
            return _to_rgb(_upright(picture))
        size = fitting_size(*picture.size, image.pixel_budget)
        if picture is not source:
            picture.draft(None, size)  # a JPEG is decoded at a half, quarter or eighth at once
        return _smaller(_to_rgb(_upright(picture)), image.pixel_budget)
    except ImageError:
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ImageError(f"{name}: no such file") from error
    except PIL.UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a picture in a format that Pillow reads") from error
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: far too large ({error}); make it smaller") from error
    except Exception as error:  # decoders of broken files raise whatever they like
        raise ImageError(f"{name}: cannot be decoded ({error}); replace or remove it") from error


def fitting_size(width: int, height: int, pixel_budget: int) -> tuple[int, int]:
    """The largest size of the same shape with at most `pixel_budget` pixels; sides are at least 1.

    A picture that fits keeps its size.
    """
    if width * height <= pixel_budget:
        return width, height
    scale = math.sqrt(pixel_budget / (width * height))
    new_width, new_height = max(1, int(width * scale)), max(1, int(height * scale))
    # A side that was rounded up to 1 leaves less for the other.
    return (
        max(1, min(new_width, pixel_budget // new_height)),
        max(1, min(new_height, pixel_budget // new_width)),
    )


def _smaller(picture: PIL.Image.Image, pixel_budget: int) -> PIL.Image.Image:
    size = fitting_size(*picture.size, pixel_budget)
    return picture if size == picture.size else picture.resize(size, PIL.Image.Resampling.BICUBIC)


def _name(source: object) -> str:
    match source:
        case str() | Path():
            return f"picture {str(source)!r}"
        case Stored():
            return f"picture {source.name!r}"
        case _:
            return "picture"


def _upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    turned = picture.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1
    return PIL.ImageOps.exif_transpose(picture) if turned else picture


def _to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Transparent pictures are laid on white, as a viewer shows them."""
    picture.load()
    if picture.mode.startswith("I;16"):
        # Pillow would clip 65,535 levels at 255, which leaves white.
        picture = picture.convert("I").point(lambda level: level / 257).convert("L")
    if picture.mode in {"RGBA", "LA", "PA"} or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", rgba.size, "white")
        return PIL.Image.alpha_composite(white, rgba).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


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
    """Some frames of a video.

    frames    RGB, in order
    indices   which frames of the video they are
    total     how many frames the video has
    fps       of the video; None: unknown
    """

    frames: tuple[PIL.Image.Image, ...]
    indices: tuple[int, ...]
    total: int
    fps: float | None = None


def open_video(video: Video, max_frames: int) -> Clip:
    """At most `max_frames` frames of a video, evenly spaced: the middles of equal parts.

    Raises ImageError, naming the file, when it is missing, cannot be decoded or has no frames, and
    when PyAV, which reads video files, is not installed.
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
        raise ImageError(f"video {str(path)!r}: no such file")
    return _decoded(str(path), path.stat().st_mtime_ns, max_frames, video.pixel_budget)


def evenly_spaced(total: int, count: int) -> tuple[int, ...]:
    """The middles of `count` equal parts of range(total); all of it when that is no more."""
    count = min(total, count)
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))


@functools.lru_cache(maxsize=4)
def _decoded(path: str, modified_ns: int, max_frames: int, pixel_budget: int | None) -> Clip:
    """A video that several prompts of a batch show is decoded once, and its frames are the same."""
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
            found = {}
            for i, frame in enumerate(container.decode(stream)):
                if i in wanted:
                    found[i] = open_image(Image(frame.to_image(), pixel_budget))
                if len(found) == len(wanted):
                    break
            rate = stream.average_rate
    except ImageError:
        raise
    except Exception as error:  # decoders of broken files raise whatever they like
        raise ImageError(f"{name}: cannot be decoded ({error}); replace or remove it") from error
    if not found:
        raise ImageError(f"{name}: it has no frames; replace or remove it")
    # A file may hold fewer frames than it says.
    frames = tuple(found[i] for i in sorted(found))
    return Clip(frames, tuple(sorted(found)), total, float(rate) if rate else None)
