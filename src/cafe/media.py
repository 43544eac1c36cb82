"""Open pictures safely: decode, bound, orient, convert to RGB.

Every picture, from a training file or a request, passes through `open_image`, so a
decompression bomb or a truncated file is one clear error everywhere.
"""

from __future__ import annotations

import io
from pathlib import Path

import PIL.Image
import PIL.ImageOps

from cafe.errors import ImageError
from cafe.types import Image

MAX_PIXELS = 100_000_000
"""Largest picture that is decoded (width x height). 20,000 x 20,000 is refused."""

MAX_ASPECT_RATIO = 200
"""Image processors fail in obscure ways beyond it."""


def open_image(image: Image, *, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Decode `image` to RGB, upright (EXIF orientation applied).

    Raises ImageError, naming the file, when it is missing, not a picture, truncated, empty,
    larger than `max_pixels` or longer than `MAX_ASPECT_RATIO` times its width.
    """
    source = image.source
    name = f"picture {str(source)!r}" if isinstance(source, str | Path) else "picture"
    try:
        if isinstance(source, PIL.Image.Image):
            picture = source
        else:
            stream = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
            with _no_bomb_check():
                picture = PIL.Image.open(stream)
        width, height = picture.size
        _check_size(name, width, height, max_pixels)
        picture.load()
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except PIL.UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a picture in a format that Pillow reads") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{name}: cannot be decoded ({error}); replace or remove it") from error
    if not isinstance(source, PIL.Image.Image):
        picture = PIL.ImageOps.exif_transpose(picture)
    return _to_rgb(picture)


def _to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Transparent pictures are laid on white, as a viewer shows them."""
    if picture.mode == "RGB":
        return picture
    if picture.mode in {"RGBA", "LA", "PA"} or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", rgba.size, "white")
        return PIL.Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")


def _check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width}x{height} pixels exceed the limit of {max_pixels:,}; make it smaller"
        )
    if max(width, height) > MAX_ASPECT_RATIO * max(1, min(width, height)):
        raise ImageError(
            f"{name}: {width}x{height} is longer than {MAX_ASPECT_RATIO}:1; crop it"
        )


class _no_bomb_check:  # noqa: N801 - reads as a statement
    """Pillow's own limit only warns between one and two times its size; ours decides instead."""

    def __enter__(self) -> None:
        self._limit = PIL.Image.MAX_IMAGE_PIXELS
        PIL.Image.MAX_IMAGE_PIXELS = None

    def __exit__(self, *_: object) -> None:
        PIL.Image.MAX_IMAGE_PIXELS = self._limit
