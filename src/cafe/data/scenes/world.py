"""A seed → a scene: which things lie where, how big and turned how, on which background.

Two splits. Their random streams start from different numbers, so no train scene is ever a test
scene; and about a tenth of the unordered pairs of kinds (by a hash of the two names) is shown
together in test scenes only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from typing import Literal

import numpy as np

from cafe.data.scenes.glyphs import ink, sprite
from cafe.data.scenes.kinds import KIND_NAMES

Split = Literal["train", "test"]
Size = Literal["small", "big"]

PICTURE_PIXELS = 96
SIZES: dict[Size, tuple[int, int]] = {"small": (22, 26), "big": (42, 46)}  # longer side, pixels
PLACES: dict[str, tuple[int, int]] = {  # middle of each place: x to the right, y downward
    "top left": (26, 26),
    "top right": (70, 26),
    "bottom left": (26, 70),
    "bottom right": (70, 70),
    "centre": (48, 48),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (247, 246, 242),
    "grey": (184, 186, 188),
    "blue": (168, 200, 232),
    "green": (182, 222, 178),
    "yellow": (248, 232, 160),
    "pink": (246, 200, 212),
}
MAX_HIDDEN = 0.35  # of an object's ink, under the objects drawn after it

_JITTER_PIXELS = 7
_CENTRE_JITTER_PIXELS = 5  # less, so that the centre stays clear of the corners
_MAX_ANGLE_DEGREES = 25.0
_COUNT_WEIGHTS = (0.2, 0.3, 0.3, 0.2)  # one to four objects
_TWIN_SHARE = 0.12  # scenes in which one kind appears twice
_HELD_OUT_SHARE = 0.1  # pairs of kinds kept for the test split
_TEST_HELD_OUT_SHARE = 0.5  # test scenes of two or more objects that show such a pair
_SCENES_PER_SEED = 10**9
_SPLIT_CODES: dict[Split, int] = {"train": 1, "test": 2}
_STREAM_CODES = {"scene": 1, "noise": 2, "language": 3}


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One thing: (x, y) is the middle of its ink in pixels, `pixels` its longer side unturned."""

    kind: str
    size: Size
    place: str
    x: int
    y: int
    pixels: int
    angle_degrees: float

    @property
    def sprite_box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of its picture."""
        width, height = sprite(self.kind, self.pixels, self.angle_degrees).size
        left, top = self.x - width // 2, self.y - height // 2
        return left, top, left + width, top + height


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture's exact content. Later objects lie on top of earlier ones."""

    seed: int
    split: Split
    background: str
    objects: tuple[SceneObject, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The different kinds shown, in the order of `objects`."""
        return tuple(dict.fromkeys(item.kind for item in self.objects))


def random_stream(seed: int, split: Split, purpose: str) -> np.random.Generator:
    """The random numbers of one scene for one purpose: "scene", "noise" or "language"."""
    return np.random.default_rng([_SPLIT_CODES[split], _STREAM_CODES[purpose], seed])


def scene_seed(seed: int, index: int) -> int:
    """The own seed of scene number `index` in the data set of `seed`: no two sets share one."""
    return seed * _SCENES_PER_SEED + index


@cache
def is_held_out(kind: str, other: str) -> bool:
    """Whether the two kinds are shown together in test scenes only. Symmetric."""
    if kind == other:
        return False
    pair = "+".join(sorted((kind, other))).encode()
    fraction = int.from_bytes(blake2b(pair, digest_size=8).digest(), "big") / 2**64
    return fraction < _HELD_OUT_SHARE


def has_held_out_pair(kinds: tuple[str, ...]) -> bool:
    return any(is_held_out(kind, other) for kind in kinds for other in kinds)


def sample_scene(seed: int, split: Split = "train") -> Scene:
    """The scene of `seed` (not negative) in `split`; the same arguments give the same scene."""
    rng = random_stream(seed, split, "scene")
    count = 1 + int(rng.choice(len(_COUNT_WEIGHTS), p=_COUNT_WEIGHTS))
    background = _pick(rng, tuple(BACKGROUNDS))
    kinds = _sample_kinds(rng, count, split)
    while True:  # nearly always the first or second attempt
        order = rng.permutation(len(PLACES))[:count]
        places = [tuple(PLACES)[index] for index in order]
        objects = tuple(
            _sample_object(rng, kind, place) for kind, place in zip(kinds, places, strict=True)
        )
        if max(hidden_fractions(objects)) <= MAX_HIDDEN:
            return Scene(seed, split, background, objects)


def hidden_fractions(objects: tuple[SceneObject, ...]) -> list[float]:
    """For each object the fraction of its ink that later objects cover."""
    covered = np.zeros((PICTURE_PIXELS, PICTURE_PIXELS), dtype=bool)
    fractions = []
    for item in reversed(objects):
        left, top, right, bottom = item.sprite_box
        mask = ink(sprite(item.kind, item.pixels, item.angle_degrees))
        behind = covered[top:bottom, left:right]
        fractions.append(float((mask & behind).sum() / mask.sum()))
        behind |= mask
    return fractions[::-1]


def _sample_kinds(rng: np.random.Generator, count: int, split: Split) -> list[str]:
    """`count` kinds in random order, with the twins and held-out pairs the split asks for."""
    twins = count >= 2 and rng.random() < _TWIN_SHARE
    held_out = split == "test" and count >= 2 and rng.random() < _TEST_HELD_OUT_SHARE
    if held_out and count == 2:
        twins = False
    kinds = [_pick(rng, KIND_NAMES)]
    if held_out:
        kinds.append(_pick(rng, [name for name in KIND_NAMES if is_held_out(kinds[0], name)]))
    while len(kinds) < count - twins:
        name = _pick(rng, KIND_NAMES)
        if name not in kinds and (held_out or not has_held_out_pair((*kinds, name))):
            kinds.append(name)
    if twins:
        kinds.append(_pick(rng, kinds))
    return [kinds[index] for index in rng.permutation(count)]


def _sample_object(rng: np.random.Generator, kind: str, place: str) -> SceneObject:
    """An object of `kind` near the middle of `place`, moved inward if it would be cut off."""
    size: Size = "big" if rng.random() < 0.5 else "small"
    low, high = SIZES[size]
    pixels = int(rng.integers(low, high + 1))
    angle = round(float(rng.uniform(-_MAX_ANGLE_DEGREES, _MAX_ANGLE_DEGREES)), 1)
    jitter = _CENTRE_JITTER_PIXELS if place == "centre" else _JITTER_PIXELS
    shift_x, shift_y = (int(value) for value in rng.integers(-jitter, jitter + 1, size=2))
    x, y = PLACES[place][0] + shift_x, PLACES[place][1] + shift_y
    item = SceneObject(kind, size, place, x, y, pixels, angle)
    left, top, right, bottom = item.sprite_box
    return replace(item, x=x + _inward(left, right), y=y + _inward(top, bottom))


def _inward(low: int, high: int) -> int:
    """How far to move the interval so that it lies in the picture."""
    return max(0, -low) - max(0, high - PICTURE_PIXELS)


def _pick(rng: np.random.Generator, names: tuple[str, ...] | list[str]) -> str:
    return names[int(rng.integers(len(names)))]
