"""A scene → questions with exact answers.

Yes/no questions are balanced and cannot be answered without looking: the absent thing is often
of the same category as a thing that is there, and a wrong statement is a near miss.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations
from typing import TypeVar

import numpy as np

from cafe.data.scenes.kinds import CATEGORIES, KIND_NAMES, KINDS, plural, with_article
from cafe.data.scenes.language import caption, list_objects, place_phrase
from cafe.data.scenes.world import PLACES, Scene, SceneObject

MATCH_QUESTION = 'Does the picture show "{statement}"? Answer yes or no.'
PRESENCE_QUESTION = "Is there {thing} in the picture? Answer yes or no."
NUMBER_WORDS = ("zero", "one", "two", "three", "four")

_MATCH_ATTEMPTS = 5
_BESIDE_PIXELS, _AHEAD_PIXELS = 10, 18  # up to: not left of it; from: left of it; between: unclear

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question:
    """`kind` is one of `QUESTION_KINDS`; `answer` is lower-case without a full stop."""

    kind: str
    text: str
    answer: str


def questions(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """Up to `count` different questions about `scene`, their kinds in fixed shares.

    Fewer than `count` only when the scene has no more to ask.
    """
    found: list[Question] = []
    for _ in range(10 * count):
        if len(found) == count:
            break
        kind = QUESTION_KINDS[bisect(_CUMULATIVE_SHARES, float(rng.random()))]
        question = _ASK[kind](scene, rng, found)
        if question is not None and question.text not in {other.text for other in found}:
            found.append(question)
    return found


def _presence(scene: Scene, rng: np.random.Generator, found: list[Question]) -> Question | None:
    """Yes or no by a coin; a present kind, or an absent one (half of them look-alikes).

    Each answer is given at most once per kind that is there. Only so many "yes" exist; the same
    bound on "no" keeps the answers balanced although no question is asked twice.
    """
    answer = _coin(rng)
    asked = [q for q in found if q.kind == "presence"]
    if sum(q.answer == answer for q in asked) >= len(scene.kinds):
        return None
    while True:
        name = _one(rng, scene.kinds) if answer == "yes" else _absent_kind(scene, rng)
        text = PRESENCE_QUESTION.format(thing=with_article(name))
        if text not in {q.text for q in asked}:
            return Question("presence", text, answer)


def _object(scene: Scene, rng: np.random.Generator, found: list[Question]) -> Question:
    item = _one(rng, scene.objects)
    return Question("object", f"What is {place_phrase(item.place)}?", item.kind)


def _count(scene: Scene, rng: np.random.Generator, found: list[Question]) -> Question:
    """All objects, or those of one kind: a twin where there is one, else any, else an absent."""
    names = [item.kind for item in scene.objects]
    if rng.random() < 0.4:
        return Question("count", "How many objects are there?", NUMBER_WORDS[len(names)])
    twins = [name for name in names if names.count(name) > 1]
    name = _absent_kind(scene, rng) if rng.random() < 0.3 else _one(rng, twins or names)
    return Question("count", f"How many {plural(name)} are there?", NUMBER_WORDS[names.count(name)])


def _relation(scene: Scene, rng: np.random.Generator, found: list[Question]) -> Question | None:
    """Asked only when one object lies clearly on that side and every other one clearly not."""
    item = _single(scene, rng)
    if item is None:
        return None
    words, axis, sign = _one(rng, _DIRECTIONS)
    ahead = [(o.kind, sign * ((o.x, o.y)[axis] - (item.x, item.y)[axis])) for o in scene.objects]
    others = [kind for kind, pixels in ahead if pixels > _BESIDE_PIXELS]
    if len(others) != 1 or max(pixels for _, pixels in ahead) < _AHEAD_PIXELS:
        return None
    return Question("relation", f"What is {words} the {item.kind}?", others[0])


def _colour(scene: Scene, rng: np.random.Generator, found: list[Question]) -> Question | None:
    item = _single(scene, rng)
    if item is None:
        return None
    return Question("colour", f"What colour is the {item.kind}?", KINDS[item.kind].colour)


def _background(scene: Scene, rng: np.random.Generator, found: list[Question]) -> Question:
    return Question("background", "What colour is the background?", scene.background)


def _size(scene: Scene, rng: np.random.Generator, found: list[Question]) -> Question | None:
    item = _single(scene, rng)
    return item and Question("size", f"Is the {item.kind} big or small?", item.size)


def _place(scene: Scene, rng: np.random.Generator, found: list[Question]) -> Question | None:
    item = _single(scene, rng)
    return item and Question("place", f"Where is the {item.kind}?", item.place)


def _match(scene: Scene, rng: np.random.Generator, found: list[Question]) -> Question:
    """Yes or no by a coin; the statement is a full caption or a list of some of the objects."""
    answer = _coin(rng)
    asked = {q.text for q in found}
    text = ""
    for _ in range(_MATCH_ATTEMPTS):  # the same answer again, so that the balance stays
        told = scene if answer == "yes" else near_miss(scene, rng)
        text = MATCH_QUESTION.format(statement=_statement(told, scene, rng))
        if text not in asked:
            break
    return Question("match", text, answer)


def _statement(told: Scene, scene: Scene, rng: np.random.Generator) -> str:
    """What is said: `told`, or part of it; where it differs from `scene`, a differing part."""
    if rng.random() < 0.5:
        return caption(told, rng)
    objects = [told.objects[index] for index in rng.permutation(len(told.objects))]
    truth = facts(scene)
    wrong = [item for item in objects if (item.size, item.kind, item.place) not in truth]
    count = int(rng.integers(1, len(objects) + 1))
    chosen = (wrong or objects)[:1]
    chosen += [item for item in objects if item not in chosen][: count - 1]
    return list_objects([chosen[index] for index in rng.permutation(count)])


def facts(scene: Scene) -> set[tuple[str, str, str]]:
    """(size, kind, place) of each object: what a caption says of it."""
    return {(item.size, item.kind, item.place) for item in scene.objects}


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """`scene` with one thing wrong: two places exchanged, a size, a place or a kind changed."""
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
        objects[index] = replace(item, kind=_absent_kind(scene, rng, like=item.kind))
    return replace(scene, objects=tuple(objects))


def _absent_kind(scene: Scene, rng: np.random.Generator, like: str | None = None) -> str:
    """A kind that is not in the scene; in half of the cases one of the category of `like`."""
    names: Sequence[str] = KIND_NAMES
    if rng.random() < 0.5:
        names = CATEGORIES[KINDS[like or _one(rng, scene.kinds)].category]
    while True:
        name = _one(rng, names)
        if name not in scene.kinds:
            return name


def _single(scene: Scene, rng: np.random.Generator) -> SceneObject | None:
    """An object that is the only one of its kind, so that "the cat" is one thing."""
    names = [item.kind for item in scene.objects]
    items = [item for item in scene.objects if names.count(item.kind) == 1]
    return _one(rng, items) if items else None


def _one(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _coin(rng: np.random.Generator) -> str:
    return "yes" if rng.random() < 0.5 else "no"


_DIRECTIONS = (("left of", 0, -1), ("right of", 0, 1), ("above", 1, -1), ("below", 1, 1))

_Asker = Callable[[Scene, np.random.Generator, list[Question]], Question | None]
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
