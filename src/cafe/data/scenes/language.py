"""A scene → captions in English; a text → the object classes it names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from cafe.data.scenes.classes import CLASS_NAMES, plural
from cafe.data.scenes.world import Scene, SceneObject

_PLACE_PHRASES = {"centre": "in the centre"}  # all others: "at the ..."

_NAMED = {form: name for name in CLASS_NAMES for form in (name, plural(name))}
_NAMES = re.compile(
    # Longest first, so that a two-word name wins over a name it contains.
    r"\b(?:" + "|".join(sorted(map(re.escape, _NAMED), key=len, reverse=True)) + r")\b",
    re.IGNORECASE,
)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One sentence that names every object with its size, class and place, in random order.

    Half of the templates name the background as well.
    """
    template = _TEMPLATES[int(rng.integers(len(_TEMPLATES)))]
    objects = [scene.objects[index] for index in rng.permutation(len(scene.objects))]
    text = template(objects, scene.background)
    return text[0].upper() + text[1:] + "."


def list_objects(objects: Sequence[SceneObject]) -> str:
    """The objects in this order: "a big cat at the top left and a small bus in the centre"."""
    return _join([f"a {item.size} {item.kind} {place_phrase(item.place)}" for item in objects])


def place_phrase(place: str) -> str:
    return _PLACE_PHRASES.get(place, f"at the {place}")


def mentioned_classes(text: str) -> set[str]:
    """The object classes that `text` names, in the singular or the plural, as whole words."""
    return {_NAMED[" ".join(match.lower().split())] for match in _NAMES.findall(text)}


def _join(phrases: Sequence[str]) -> str:
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _place_first(objects: Sequence[SceneObject]) -> str:
    """The places first: "at the top left there is a big cat and in the centre a small bus"."""
    first, *others = objects
    phrases = [f"{place_phrase(first.place)} there is a {first.size} {first.kind}"]
    phrases += [f"{place_phrase(item.place)} a {item.size} {item.kind}" for item in others]
    return _join(phrases)


_TEMPLATES: tuple[Callable[[Sequence[SceneObject], str], str], ...] = (
    lambda objects, background: list_objects(objects),
    lambda objects, background: f"{list_objects(objects)}, on a {background} background",
    lambda objects, background: f"the picture shows {list_objects(objects)}",
    lambda objects, background: f"on a {background} background there is {list_objects(objects)}",
    lambda objects, background: f"a {background} background with {list_objects(objects)}",
    lambda objects, background: _place_first(objects),
)
