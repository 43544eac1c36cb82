"""Open pictures safely: decode, bound, orient, convert to RGB.

Every picture, from a training file or a request, passes through `open_image`, so a
decompression bomb or a truncated file is one clear error everywhere.
"""

from __future__ import annotations

import io
from pathlib import Path

import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from cafe.errors import ImageError
from cafe.types import Image

MAX_PIXELS = 89_000_000
"""Largest picture that is decoded (width x height), just below where Pillow begins to warn."""

MAX_ASPECT_RATIO = 200
"""Image processors fail in obscure ways beyond it."""


def open_image(image: Image, *, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Decode `image` to RGB, upright (EXIF orientation applied).

    max_pixels   a smaller bound, if wanted; Pillow itself refuses twice `MAX_PIXELS` and more
    Raises ImageError, naming the file, when it is missing, not a picture, truncated, empty,
    larger than `max_pixels` or longer than `MAX_ASPECT_RATIO` times its width.
    """
    source = image.source
    name = f"picture {str(source)!r}" if isinstance(source, str | Path) else "picture"
    try:
        if isinstance(source, PIL.Image.Image):
            picture = source
        else:
            picture = PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        _check_size(name, *picture.size, max_pixels)
        return _to_rgb(_upright(picture))
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
