"""A scene → questions with exact answers.

Yes/no questions are balanced and cannot be answered without looking at the image: the absent object
class often has the category of a present one, and a false statement is a near miss.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations
from typing import TypeVar

import numpy as np

from cafe.data.scenes.classes import CATEGORIES, CLASS_NAMES, CLASSES, plural, with_article
from cafe.data.scenes.language import caption, list_objects, place_phrase
from cafe.data.scenes.world import PLACES, Scene, SceneObject
from cafe.types import MATCH_QUESTION

PRESENCE_QUESTION = "Is there {thing} in the picture? Answer yes or no."
NUMBER_WORDS = ("zero", "one", "two", "three", "four")

_MATCH_ATTEMPTS = 5
# An offset up to the first counts as "not left of", from the second on as "left of"; between them
# it is ambiguous, and no question is asked.
_MAX_SAME_SIDE_PIXELS, _MIN_OFFSET_PIXELS = 10, 18

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SceneQuestion:
    """`kind` is one of `QUESTION_KINDS`; `answer` is lower-case, without a full stop."""

    kind: str
    text: str
    answer: str


def questions(scene: Scene, rng: np.random.Generator, count: int) -> list[SceneQuestion]:
    """Up to `count` different questions about `scene`; the kinds of question have fixed shares.

    Fewer than `count` only if the scene does not allow more.
    """
    asked: list[SceneQuestion] = []
    for _ in range(10 * count):
        if len(asked) == count:
            break
        kind = QUESTION_KINDS[bisect(_CUMULATIVE_SHARES, float(rng.random()))]
        question = _ASK[kind](scene, rng, asked)
        if question is not None and question.text not in {other.text for other in asked}:
            asked.append(question)
    return asked


def _presence(
    scene: Scene, rng: np.random.Generator, asked: list[SceneQuestion]
) -> SceneQuestion | None:
    """Yes or no at random; a present class, or an absent one (half of them of a present category).

    Each answer occurs at most once per class in the scene. No more questions have the
    answer "yes"; the same bound on "no" keeps the answers balanced though no question is repeated.
    """
    answer = _coin(rng)
    before = [q for q in asked if q.kind == "presence"]
    if sum(q.answer == answer for q in before) >= len(scene.classes):
        return None
    while True:
        name = _one(rng, scene.classes) if answer == "yes" else _absent_class(scene, rng)
        text = PRESENCE_QUESTION.format(thing=with_article(name))
        if text not in {q.text for q in before}:
            return SceneQuestion("presence", text, answer)


def _object(scene: Scene, rng: np.random.Generator, asked: list[SceneQuestion]) -> SceneQuestion:
    item = _one(rng, scene.objects)
    return SceneQuestion("object", f"What is {place_phrase(item.place)}?", item.kind)


def _count(scene: Scene, rng: np.random.Generator, asked: list[SceneQuestion]) -> SceneQuestion:
    """All objects or those of one class: one shown twice if any is, else any, or an absent one."""
    names = [item.kind for item in scene.objects]
    if rng.random() < 0.4:
        return SceneQuestion("count", "How many objects are there?", NUMBER_WORDS[len(names)])
    twins = [name for name in names if names.count(name) > 1]
    name = _absent_class(scene, rng) if rng.random() < 0.3 else _one(rng, twins or names)
    return SceneQuestion(
        "count", f"How many {plural(name)} are there?", NUMBER_WORDS[names.count(name)]
    )


def _relation(
    scene: Scene, rng: np.random.Generator, asked: list[SceneQuestion]
) -> SceneQuestion | None:
    """Asked only if one object is clearly on that side and every other one clearly is not."""
    item = _single(scene, rng)
    if item is None:
        return None
    relation, axis, sign = _one(rng, _DIRECTIONS)
    offsets = [(o.kind, sign * ((o.x, o.y)[axis] - (item.x, item.y)[axis])) for o in scene.objects]
    others = [name for name, pixels in offsets if pixels > _MAX_SAME_SIDE_PIXELS]
    if len(others) != 1 or max(pixels for _, pixels in offsets) < _MIN_OFFSET_PIXELS:
        return None
    return SceneQuestion("relation", f"What is {relation} the {item.kind}?", others[0])


def _colour(
    scene: Scene, rng: np.random.Generator, asked: list[SceneQuestion]
) -> SceneQuestion | None:
    item = _single(scene, rng)
    if item is None:
        return None
    return SceneQuestion("colour", f"What colour is the {item.kind}?", CLASSES[item.kind].colour)


def _background(
    scene: Scene, rng: np.random.Generator, asked: list[SceneQuestion]
) -> SceneQuestion:
    return SceneQuestion("background", "What colour is the background?", scene.background)


def _size(
    scene: Scene, rng: np.random.Generator, asked: list[SceneQuestion]
) -> SceneQuestion | None:
    item = _single(scene, rng)
    return item and SceneQuestion("size", f"Is the {item.kind} big or small?", item.size)


def _place(
    scene: Scene, rng: np.random.Generator, asked: list[SceneQuestion]
) -> SceneQuestion | None:
    item = _single(scene, rng)
    return item and SceneQuestion("place", f"Where is the {item.kind}?", item.place)


def _match(scene: Scene, rng: np.random.Generator, asked: list[SceneQuestion]) -> SceneQuestion:
    """Yes or no at random; the statement is a full caption or a list of some of the objects."""
    answer = _coin(rng)
    texts = {q.text for q in asked}
    text = ""
    for _ in range(_MATCH_ATTEMPTS):  # with the same answer, so that the answers stay balanced
        described = scene if answer == "yes" else near_miss(scene, rng)
        text = MATCH_QUESTION.format(statement=_statement(described, scene, rng))
        if text not in texts:
            break
    return SceneQuestion("match", text, answer)


def _statement(described: Scene, scene: Scene, rng: np.random.Generator) -> str:
    """A text about `described`, or a part of it that differs from `scene` if the two differ."""
    if rng.random() < 0.5:
        return caption(described, rng)
    objects = [described.objects[index] for index in rng.permutation(len(described.objects))]
    truth = facts(scene)
    wrong = [item for item in objects if (item.size, item.kind, item.place) not in truth]
    count = int(rng.integers(1, len(objects) + 1))
    chosen = (wrong or objects)[:1]
    chosen += [item for item in objects if item not in chosen][: count - 1]
    return list_objects([chosen[index] for index in rng.permutation(count)])


def facts(scene: Scene) -> set[tuple[str, str, str]]:
    """(size, class, place) of each object: what a caption says about it."""
    return {(item.size, item.kind, item.place) for item in scene.objects}


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """`scene` with one error: two objects swapped, or one size, place or class changed."""
    objects = list(scene.objects)
    pairs = [
        (i, j)
        for i, j in combinations(range(len(objects)), 2)
        if (objects[i].size, objects[i].kind) != (objects[j].size, objects[j].kind)
    ]
    change = _one(rng, ("swap", "size", "place", "kind") if pairs else ("size", "place", "kind"))
    index = int(rng.integers(len(objects)))
    item = objects[index]
    if change == "swap":
        i, j = _one(rng, pairs)
        first, second = objects[i], objects[j]
        objects[i] = replace(first, place=second.place)
        objects[j] = replace(second, place=first.place)
    elif change == "size":
        objects[index] = replace(item, size="small" if item.size == "big" else "big")
    elif change == "place":
        taken = {other.place for other in objects}
        objects[index] = replace(item, place=_one(rng, [p for p in PLACES if p not in taken]))
    else:
        objects[index] = replace(item, kind=_absent_class(scene, rng, like=item.kind))
    return replace(scene, objects=tuple(objects))


def _absent_class(scene: Scene, rng: np.random.Generator, like: str | None = None) -> str:
    """A class that is not in the scene; in half of the cases of the category of `like`."""
    names: Sequence[str] = CLASS_NAMES
    if rng.random() < 0.5:
        names = CATEGORIES[CLASSES[like or _one(rng, scene.classes)].category]
    while True:
        name = _one(rng, names)
        if name not in scene.classes:
            return name


def _single(scene: Scene, rng: np.random.Generator) -> SceneObject | None:
    """An object that is the only one of its class, so that "the cat" is unambiguous."""
    names = [item.kind for item in scene.objects]
    items = [item for item in scene.objects if names.count(item.kind) == 1]
    return _one(rng, items) if items else None


def _one(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _coin(rng: np.random.Generator) -> str:
    return "yes" if rng.random() < 0.5 else "no"


_DIRECTIONS = (("left of", 0, -1), ("right of", 0, 1), ("above", 1, -1), ("below", 1, 1))

_Asker = Callable[[Scene, np.random.Generator, list[SceneQuestion]], SceneQuestion | None]
_ASK: dict[str, _Asker] = {
    "presence": _presence,
    "object": _object,
    "match": _match,
    "count": _count,
    "relation": _relation,
    "colour": _colour,
    "background": _background,
    "size": _size,
    "place": _place,
}
QUESTION_KINDS: tuple[str, ...] = tuple(_ASK)
_CUMULATIVE_SHARES = tuple(accumulate((0.25, 0.25, 0.2, *[0.05] * 5)))  # the last one: the rest
