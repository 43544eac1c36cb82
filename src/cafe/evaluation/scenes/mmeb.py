"""scenes-mmeb: MMEB's four meta-tasks on the bundled world, with exact truth.

    classification   background; things (which kinds are there)
    vqa              object at a location; relation; colour
    retrieval        image -> caption; caption -> image; composed (an image, but with one kind
                     replaced -> the image where it is)
    grounding        an image and a kind -> the crop that shows it

A query's wrong candidates are the other possible answers, or those of other scenes, near misses
first. Every data set has two halves: scenes that show a pair of kinds never seen together in
training are out of distribution (`ood`), all others in distribution (`ind`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cafe.data.formats.mmeb import Ranked
from cafe.data.scenes import (
    BACKGROUNDS,
    CATEGORIES,
    CLASS_NAMES,
    CLASSES,
    COLOURS,
    Scene,
    SceneObject,
    draw,
    questions,
)
from cafe.data.scenes.classes import with_article
from cafe.evaluation.mmeb.groups import half_means
from cafe.evaluation.scenes.held_out import SceneItem, item_stream
from cafe.evaluation.scoring import Ratio
from cafe.evaluation.task import Encode, TaskResult
from cafe.evaluation.tasks.ranking import rank_candidates
from cafe.media import open_image
from cafe.types import Conversation, Image, Part, user

LIST_LENGTH = 20
"""Number of candidates of a retrieval query."""
CROPS = 8

INSTRUCTIONS = {
    "background": "Identify the colour of the background",
    "things": "Identify the things shown in the image",
    "vqa": "Represent the given image with the following question: ",
    "composed": "Find the same image with the described changes: ",
    "crop": "Select the portion of the image that isolates the object labeled as ",
}
"""Instructions of queries that combine image and text, as in MMEB. Plain retrieval has none."""


@dataclass(frozen=True, slots=True)
class _World:
    """The scenes of an evaluation, and the crops that were cut from them."""

    items: Sequence[SceneItem]
    crops: dict[tuple[str, int], Image] = field(default_factory=dict)

    def cut(self, item: SceneItem, thing: SceneObject) -> Image:
        """The crop that shows `thing`; the same object each time, so it is embedded once."""
        key = item.id, item.scene.objects.index(thing)
        if key not in self.crops:
            self.crops[key] = Image(open_image(item.image).crop(thing.sprite_box))
        return self.crops[key]

    def others(self, index: int, count: int, rng: np.random.Generator) -> list[SceneItem]:
        """Up to `count` scenes with a different caption than that of scene `index`."""
        chosen = [self.items[i] for i in rng.permutation(len(self.items)).tolist()]
        return [i for i in chosen if i.caption != self.items[index].caption][:count]


_Maker = Callable[[_World, int, np.random.Generator], Ranked | None]


def scenes_mmeb(encode: Encode, scenes: Sequence[SceneItem]) -> TaskResult:
    """hit@1 of every data set. Scores: `<set>/<ind|ood>`, `<meta-task>`, `ind`, `ood`, `all`
    (plain means over data sets, as MMEB reports them), and `chance`, that of guessing.

    Raises:
        DataError: as in `rank_candidates`.
    """
    world = _World(scenes)
    items: dict[str, np.ndarray] = {}
    ratios: dict[str, Ratio] = {}
    ids: list[str] = []
    groups: dict[str, tuple[str, bool]] = {}
    chances: list[float] = []
    for number, (name, (meta, make)) in enumerate(SETS.items()):
        for half, unseen in (("ind", False), ("ood", True)):
            queries = list(_queries(world, make, number, unseen))
            if not queries:
                continue
            score = f"{name}/{half}"
            ranking = rank_candidates(encode, queries, score)
            items[f"{score}:hit"] = ranking.hit.astype(np.int64)
            ratios[score] = Ratio(f"{score}:hit")
            groups[score] = (meta, unseen)
            chances.append(float(ranking.chance.mean()))
            ids += [f"{score}:{id}" for id in ranking.ids]
    return TaskResult(
        len(ids),
        items,
        ratios,
        half_means(groups),
        plain={"chance": float(np.mean(chances))},
        ids=tuple(ids),
        details={"prompts": INSTRUCTIONS},
    )


def _queries(world: _World, make: _Maker, number: int, unseen: bool) -> Iterator[Ranked]:
    for index, item in enumerate(world.items):
        if item.unseen == unseen:
            query = make(world, index, item_stream(item, 100 + number))
            if query is not None:
                yield query


def _about(item: SceneItem, text: str) -> Conversation:
    return user(item.image, text)


def _ranked(item: SceneItem, query: Conversation, right: Part, wrong: Sequence[Part]) -> Ranked:
    return Ranked(item.id, query, tuple(user(part) for part in (right, *wrong)), (0,))


def _names(right: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name != right]


# ---------------------------------------------------------------- classification


def _background(world: _World, index: int, rng: np.random.Generator) -> Ranked:
    item = world.items[index]
    right = item.scene.background
    query = _about(item, INSTRUCTIONS["background"])
    return _ranked(item, query, right, _names(right, list(BACKGROUNDS)))


def _things(world: _World, index: int, rng: np.random.Generator) -> Ranked:
    """Wrong: the kinds with one replaced (up to four); then the kinds of other scenes."""
    item = world.items[index]
    right = _listed(item.scene.classes)
    near = [_listed(_replaced(item.scene, rng)[0].classes) for _ in range(4)]
    far = [_listed(other.scene.classes) for other in world.others(index, LIST_LENGTH, rng)]
    wrong = _names(right, list(dict.fromkeys([*near, *far])))[: LIST_LENGTH - 1]
    return _ranked(item, _about(item, INSTRUCTIONS["things"]), right, wrong)


def _listed(kinds: Sequence[str]) -> str:
    return ", ".join(with_article(name) for name in sorted(kinds))


# ---------------------------------------------------------------- questions


def _question(kind: str, answers: Sequence[str]) -> _Maker:
    def make(world: _World, index: int, rng: np.random.Generator) -> Ranked | None:
        item = world.items[index]
        asked = next((q for q in questions(item.scene, rng, 20) if q.kind == kind), None)
        if asked is None:
            return None
        query = _about(item, INSTRUCTIONS["vqa"] + asked.text)
        return _ranked(item, query, asked.answer, _names(asked.answer, answers))

    return make


# ---------------------------------------------------------------- retrieval


def _to_text(world: _World, index: int, rng: np.random.Generator) -> Ranked:
    item = world.items[index]
    wrong = [other.caption for other in world.others(index, LIST_LENGTH - 1, rng)]
    return _ranked(item, user(item.image), item.caption, list(dict.fromkeys(wrong)))


def _to_image(world: _World, index: int, rng: np.random.Generator) -> Ranked:
    item = world.items[index]
    wrong = [other.image for other in world.others(index, LIST_LENGTH - 1, rng)]
    return _ranked(item, user(item.caption), item.image, wrong)


def _composed(world: _World, index: int, rng: np.random.Generator) -> Ranked:
    """Wrong: the image itself, the image with another replacement, images of others."""
    item = world.items[index]
    target, old, new = _replaced(item.scene, rng)
    other = next(
        scene
        for scene, _, _ in iter(lambda: _replaced(item.scene, rng), None)
        if scene.classes != target.classes
    )
    far = [o.image for o in world.others(index, LIST_LENGTH - 3, rng)]
    change = f"{with_article(new)} instead of the {old}"
    query = _about(item, INSTRUCTIONS["composed"] + change)
    return _ranked(item, query, _drawn(target), [item.image, _drawn(other), *far])


def _replaced(scene: Scene, rng: np.random.Generator) -> tuple[Scene, str, str]:
    """One kind replaced everywhere by an absent one, half of the time of the same category."""
    old = scene.classes[int(rng.integers(len(scene.classes)))]
    names = CATEGORIES[CLASSES[old].category] if rng.random() < 0.5 else CLASS_NAMES
    absent = [name for name in names if name not in scene.classes]
    new = absent[int(rng.integers(len(absent)))]
    objects = tuple(replace(o, kind=new) if o.kind == old else o for o in scene.objects)
    # Noise of its own: equal noise would give the source image away.
    return replace(scene, objects=objects, seed=int(rng.integers(2**40))), old, new


def _drawn(scene: Scene) -> Image:
    return Image(draw(scene))


# ---------------------------------------------------------------- grounding


def _crop(world: _World, index: int, rng: np.random.Generator) -> Ranked | None:
    """Wrong: the other objects of the image first, then objects of other images."""
    item = world.items[index]
    names = [o.kind for o in item.scene.objects]
    single = [o for o in item.scene.objects if names.count(o.kind) == 1]
    if not single:
        return None
    right = single[int(rng.integers(len(single)))]
    wrong = [world.cut(item, o) for o in item.scene.objects if o is not right]
    for other in world.others(index, len(world.items), rng):
        strange = [o for o in other.scene.objects if o.kind != right.kind]
        if strange and len(wrong) < CROPS - 1:
            wrong.append(world.cut(other, strange[0]))
    query = _about(item, INSTRUCTIONS["crop"] + right.kind)
    return _ranked(item, query, world.cut(item, right), wrong)


SETS: dict[str, tuple[str, _Maker]] = {
    "background": ("classification", _background),
    "things": ("classification", _things),
    "object": ("vqa", _question("object", CLASS_NAMES)),
    "relation": ("vqa", _question("relation", CLASS_NAMES)),
    "colour": ("vqa", _question("colour", COLOURS)),
    "image_to_text": ("retrieval", _to_text),
    "text_to_image": ("retrieval", _to_image),
    "composed": ("retrieval", _composed),
    "crop": ("grounding", _crop),
}
"""Data set -> its meta-task, and the function that makes a query from a scene."""
