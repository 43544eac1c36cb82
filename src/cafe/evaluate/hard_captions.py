"""A scene -> captions that are wrong by one word, or by the order of two objects.

They share every other word with the true caption, so a model that embeds a bag of words cannot tell
them apart where the order is wrong (the test of ARO and Winoground, with exact truth).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np

from cafe.data.scenes import BACKGROUNDS, KIND_NAMES, KINDS, PLACES, Scene, SceneObject, caption

ONE_WORD = 3
"""Wrong captions of that sort per scene."""


def hard_captions(scene: Scene, seed: int) -> tuple[str, list[str], list[str]]:
    """The true caption, `ONE_WORD` captions with one wrong word, and at most one in a wrong order.

    All have the same template. The wrong words are a kind, a size, a place's half or the
    background; a swap exchanges two objects that differ. Every wrong caption is false of `scene`,
    and none says what another says.
    """
    rng = np.random.default_rng(seed)
    true = _told(scene, seed)
    wrong: dict[str, None] = {}
    for _ in range(100):  # a template without the background leaves such a change without effect
        text = _told(_one_word_wrong(scene, rng), seed)
        if text != true and _differing_words(text, true) == 1:
            wrong[text] = None
        if len(wrong) == ONE_WORD:
            break
    swapped = _two_exchanged(scene, rng)
    return true, list(wrong), [] if swapped is None else [_told(swapped, seed)]


def _told(scene: Scene, seed: int) -> str:
    """With equal seeds the template and the order of objects are equal."""
    return caption(scene, np.random.default_rng([1, seed]))


def _one_word_wrong(scene: Scene, rng: np.random.Generator) -> Scene:
    objects = list(scene.objects)
    index = int(rng.integers(len(objects)))
    item = objects[index]
    match int(rng.integers(4)):
        case 0:
            item = replace(item, kind=_other_kind(scene, item, rng))
        case 1:
            item = replace(item, size="small" if item.size == "big" else "big")
        case 2:
            taken = {other.place for other in objects}
            item = replace(item, place=_one(rng, [p for p in PLACES if p not in taken]))
        case _:
            others = [name for name in BACKGROUNDS if name != scene.background]
            return replace(scene, background=_one(rng, others))
    objects[index] = item
    return replace(scene, objects=tuple(objects))


def _other_kind(scene: Scene, item: SceneObject, rng: np.random.Generator) -> str:
    """Absent, of as many words, and in half of the cases of the same category."""
    names = [n for n in KIND_NAMES if n not in scene.kinds and n.count(" ") == item.kind.count(" ")]
    alike = [n for n in names if KINDS[n].category == KINDS[item.kind].category]
    return _one(rng, alike if alike and rng.random() < 0.5 else names)


def _two_exchanged(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """Two objects of different kinds trade places, sizes and all."""
    objects = list(scene.objects)
    pairs = [
        (i, j)
        for i, j in combinations(range(len(objects)), 2)
        if objects[i].kind != objects[j].kind
    ]
    if not pairs:
        return None
    i, j = pairs[int(rng.integers(len(pairs)))]
    a, b = objects[i], objects[j]
    objects[i] = replace(a, kind=b.kind, size=b.size)
    objects[j] = replace(b, kind=a.kind, size=a.size)
    return replace(scene, objects=tuple(objects))


def _differing_words(a: str, b: str) -> int:
    """Places at which two texts of as many words differ; -1 for different lengths."""
    left, right = a.lower().split(), b.lower().split()
    if len(left) != len(right):
        return -1
    return sum(x != y for x, y in zip(left, right, strict=True))


def _one(rng: np.random.Generator, names: list[str]) -> str:
    return names[int(rng.integers(len(names)))]
