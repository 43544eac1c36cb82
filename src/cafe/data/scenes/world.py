"""A seed → a scene → its image: which objects, where, how large, how rotated, which background.

There are two splits. Their random streams have different seeds, so no training scene is ever a test
scene; and about a tenth of the unordered pairs of object classes (chosen by a hash of the two
names) appear together in test scenes only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from typing import Literal

import numpy as np
from PIL import Image

from cafe.data.scenes.classes import CLASS_NAMES, ink, sprite

Split = Literal["train", "test"]
Size = Literal["small", "big"]

IMAGE_PIXELS = 96
SIZES: dict[Size, tuple[int, int]] = {"small": (22, 26), "big": (42, 46)}  # longer side, pixels
PLACES: dict[str, tuple[int, int]] = {  # centre of each place: x to the right, y downward
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
MAX_HIDDEN = 0.35  # fraction of an object's ink that later objects may cover

_JITTER_PIXELS = 7
_CENTRE_JITTER_PIXELS = 5  # less, so that the centre stays clear of the corners
_MAX_ANGLE_DEGREES = 25.0
_COUNT_WEIGHTS = (0.2, 0.3, 0.3, 0.2)  # one to four objects
_TWIN_SHARE = 0.12  # scenes in which one class appears twice
_HELD_OUT_SHARE = 0.1  # pairs of classes reserved for the test split
_TEST_HELD_OUT_SHARE = 0.5  # of the test scenes with two or more objects, those with such a pair
_NOISE_SIGMA = 6.0  # of 255: enough that no two images share their flat areas
_SCENES_PER_SEED = 10**9
_SPLIT_CODES: dict[Split, int] = {"train": 1, "test": 2}
_STREAM_CODES = {"scene": 1, "noise": 2, "language": 3, "negatives": 4}


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object of a scene. The fields are the keys of `truth.jsonl`.

    kind           name of its object class, one of `CLASS_NAMES`
    size, place    one of `SIZES`, one of `PLACES`
    x, y           centre of its ink, in pixels
    pixels         its longer side before the rotation
    angle_degrees  rotation, anticlockwise
    """

    kind: str
    size: Size
    place: str
    x: int
    y: int
    pixels: int
    angle_degrees: float

    @property
    def sprite_box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom edge of its sprite."""
        width, height = sprite(self.kind, self.pixels, self.angle_degrees).size
        left, top = self.x - width // 2, self.y - height // 2
        return left, top, left + width, top + height


@dataclass(frozen=True, slots=True)
class Scene:
    """The exact content of one image. Later objects lie on top of earlier ones."""

    seed: int
    split: Split
    background: str
    objects: tuple[SceneObject, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """The distinct classes shown, in the order of `objects`."""
        return tuple(dict.fromkeys(item.kind for item in self.objects))


def random_stream(seed: int, split: Split, purpose: str) -> np.random.Generator:
    """The random numbers of one scene for one purpose, one of `_STREAM_CODES`."""
    return np.random.default_rng([_SPLIT_CODES[split], _STREAM_CODES[purpose], seed])


def scene_seed(seed: int, index: int) -> int:
    """The seed of scene number `index` in the data set `seed`: no two data sets share one."""
    return seed * _SCENES_PER_SEED + index


@cache
def is_held_out(name: str, other: str) -> bool:
    """Whether the two classes appear together in test scenes only. Symmetric."""
    if name == other:
        return False
    pair = "+".join(sorted((name, other))).encode()
    fraction = int.from_bytes(blake2b(pair, digest_size=8).digest(), "big") / 2**64
    return fraction < _HELD_OUT_SHARE


def has_held_out_pair(names: tuple[str, ...]) -> bool:
    """Whether two of these classes appear together in test scenes only."""
    return any(is_held_out(name, other) for name in names for other in names)


def sample_scene(seed: int, split: Split = "train") -> Scene:
    """The scene of `seed` (not negative) in `split`; the same arguments give the same scene."""
    rng = random_stream(seed, split, "scene")
    count = 1 + int(rng.choice(len(_COUNT_WEIGHTS), p=_COUNT_WEIGHTS))
    background = _pick(rng, tuple(BACKGROUNDS))
    names = _sample_classes(rng, count, split)
    while True:  # nearly always the first or second attempt
        order = rng.permutation(len(PLACES))[:count]
        places = [tuple(PLACES)[index] for index in order]
        objects = tuple(
            _sample_object(rng, name, place) for name, place in zip(names, places, strict=True)
        )
        if max(hidden_fractions(objects)) <= MAX_HIDDEN:
            return Scene(seed, split, background, objects)


def draw(scene: Scene) -> Image.Image:
    """The image of `scene`: RGB, 96 × 96 pixels, with a little noise drawn from its seed."""
    image = Image.new("RGB", (IMAGE_PIXELS, IMAGE_PIXELS), BACKGROUNDS[scene.background])
    for item in scene.objects:
        small = sprite(item.kind, item.pixels, item.angle_degrees)
        image.paste(small, item.sprite_box, small)
    values = np.asarray(image, dtype=np.float32)
    rng = random_stream(scene.seed, scene.split, "noise")
    noise = rng.standard_normal(values.shape, dtype=np.float32) * _NOISE_SIGMA
    return Image.fromarray(np.clip(np.rint(values + noise), 0, 255).astype(np.uint8))


def hidden_fractions(objects: tuple[SceneObject, ...]) -> list[float]:
    """The fraction of each object's ink that later objects cover."""
    covered = np.zeros((IMAGE_PIXELS, IMAGE_PIXELS), dtype=bool)
    fractions = []
    for item in reversed(objects):
        left, top, right, bottom = item.sprite_box
        mask = ink(sprite(item.kind, item.pixels, item.angle_degrees))
        behind = covered[top:bottom, left:right]
        fractions.append(float((mask & behind).sum() / mask.sum()))
        behind |= mask
    return fractions[::-1]


def _sample_classes(rng: np.random.Generator, count: int, split: Split) -> list[str]:
    """`count` classes in random order, with the twins and held-out pairs that the split needs."""
    twins = count >= 2 and rng.random() < _TWIN_SHARE
    held_out = split == "test" and count >= 2 and rng.random() < _TEST_HELD_OUT_SHARE
    if held_out and count == 2:
        twins = False
    names = [_pick(rng, CLASS_NAMES)]
    if held_out:
        names.append(_pick(rng, [name for name in CLASS_NAMES if is_held_out(names[0], name)]))
    while len(names) < count - twins:
        name = _pick(rng, CLASS_NAMES)
        if name not in names and (held_out or not has_held_out_pair((*names, name))):
            names.append(name)
    if twins:
        names.append(_pick(rng, names))
    return [names[index] for index in rng.permutation(count)]


def _sample_object(rng: np.random.Generator, name: str, place: str) -> SceneObject:
    """An object of class `name` near the centre of `place`, moved inward if it would be cut off."""
    size: Size = "big" if rng.random() < 0.5 else "small"
    low, high = SIZES[size]
    pixels = int(rng.integers(low, high + 1))
    angle = round(float(rng.uniform(-_MAX_ANGLE_DEGREES, _MAX_ANGLE_DEGREES)), 1)
    jitter = _CENTRE_JITTER_PIXELS if place == "centre" else _JITTER_PIXELS
    shift_x, shift_y = (int(value) for value in rng.integers(-jitter, jitter + 1, size=2))
    x, y = PLACES[place][0] + shift_x, PLACES[place][1] + shift_y
    item = SceneObject(name, size, place, x, y, pixels, angle)
    left, top, right, bottom = item.sprite_box
    return replace(item, x=x + _inward(left, right), y=y + _inward(top, bottom))


def _inward(low: int, high: int) -> int:
    """How far to shift the interval [low, high] so that it lies inside the image."""
    return max(0, -low) - max(0, high - IMAGE_PIXELS)


def _pick(rng: np.random.Generator, names: tuple[str, ...] | list[str]) -> str:
    return names[int(rng.integers(len(names)))]
