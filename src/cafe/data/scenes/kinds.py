"""The eighty kinds of things that scenes show: name, glyph, category, main colour.

The glyphs are single code points of OpenMoji. They were chosen by eye: concrete things, told
apart at 28 pixels, with no two near duplicates. The colour is that of the largest filled area,
which is what the question "What colour is the ...?" expects.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of thing. `name` is lower-case English, one or two words."""

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

_IRREGULAR_PLURALS = {"maple leaf": "maple leaves"}


def _read_table() -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for category, lines in _TABLE.items():
        for entry in lines.replace("\n", "|").split("|"):
            if entry.strip():
                name, glyph, colour = entry.strip().rsplit(" ", 2)
                kinds[name] = Kind(name, glyph, category, colour)
    return kinds


KINDS: dict[str, Kind] = _read_table()
KIND_NAMES: tuple[str, ...] = tuple(KINDS)
CATEGORIES: dict[str, tuple[str, ...]] = {
    category: tuple(kind.name for kind in KINDS.values() if kind.category == category)
    for category in _TABLE
}
COLOURS: tuple[str, ...] = tuple(sorted({kind.colour for kind in KINDS.values()}))


def plural(name: str) -> str:
    """The plural of a kind's name: "cherry" gives "cherries", "bus" gives "buses"."""
    if name in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    if name.endswith(("s", "x", "ch", "sh", "ato")):
        return name + "es"
    return name + "s"


def with_article(name: str) -> str:
    """A kind's name after "a" or "an". No kind starts with a vowel letter that sounds otherwise."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
