"""scenes-retrieval: single captions as in `retrieval`, and hard ones that are nearly right.

A hard caption is wrong by one word, or by the order of two objects. It shares every other word with
the true caption, so a model that embeds a bag of words cannot tell them apart where the order is
wrong (the test of ARO and Winoground, with exact truth).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from cafe.data.scenes import BACKGROUNDS, CLASS_NAMES, CLASSES, PLACES, Scene, SceneObject, caption
from cafe.evaluation.scenes.held_out import SceneItem, scene_ids
from cafe.evaluation.scoring import Ratio
from cafe.evaluation.task import Encode, TaskResult
from cafe.evaluation.tasks.retrieval import ranges, retrieval_scores
from cafe.metrics import candidate_scores, hit_at_1

ONE_WORD = 3
"""Captions with one wrong word per scene."""


def scenes_retrieval(encode: Encode, scenes: Sequence[SceneItem]) -> TaskResult:
    """Rank all captions and all images, then each image's caption among wrong ones.

    Scores: those of `cafe.evaluation.tasks.retrieval`; `hard_word_accuracy`, the share of images
    for which the true caption scores above the three with one wrong word (chance 1/4);
    `hard_order_accuracy`, above the one in which two objects are swapped (chance 1/2);
    `hard_accuracy`, above all of them. A tie is a miss.

    Raises:
        DataError, ValueError: as in `cafe.metrics.two_way_ranks`.
    """
    images = encode([item.image for item in scenes])
    captions = encode([item.caption for item in scenes])
    single = retrieval_scores(images, captions, ranges([1] * len(scenes)), scene_ids(scenes))
    captions_of = [hard_captions(item.scene, item.scene.seed) for item in scenes]
    texts = list(
        dict.fromkeys(t for true, word, order in captions_of for t in (true, *word, *order))
    )
    index_of = {text: i for i, text in enumerate(texts)}
    embedded = encode(texts)

    def hits(lists: list[list[str]]) -> np.ndarray:
        """Whether the first of each image's texts scores best; False where it has no rival."""
        indices = [[index_of[text] for text in own] for own in lists]
        alone = np.array([len(own) < 2 for own in lists])
        return hit_at_1(candidate_scores(images, embedded, indices)) & ~alone

    with_order = np.array([bool(order) for _, _, order in captions_of])
    with_word = np.array([bool(word) for _, word, _ in captions_of])
    items = {
        "word_hit": hits([[true, *word] for true, word, _ in captions_of]),
        "word_asked": with_word,
        "order_hit": hits([[true, *order] for true, _, order in captions_of]),
        "order_asked": with_order,
        "hard_hit": hits([[true, *word, *order] for true, word, order in captions_of]),
        "hard_asked": with_word | with_order,
    }
    ratios = {
        "hard_word_accuracy": Ratio("word_hit", "word_asked"),
        "hard_order_accuracy": Ratio("order_hit", "order_asked"),
        "hard_accuracy": Ratio("hard_hit", "hard_asked"),
    }
    return replace(
        single,
        items=single.items | {name: values.astype(np.int64) for name, values in items.items()},
        ratios=single.ratios | ratios,
    )


# ---------------------------------------------------------------- hard captions


def hard_captions(scene: Scene, seed: int) -> tuple[str, list[str], list[str]]:
    """The true caption, `ONE_WORD` captions with one wrong word, and at most one in a wrong order.

    All have the same template. The wrong word is a kind, a size, half of a location or the
    background; a swap exchanges two objects that differ. Every wrong caption is false of `scene`,
    and no two have the same meaning.
    """
    rng = np.random.default_rng(seed)
    true = _caption(scene, seed)
    wrong: dict[str, None] = {}
    for _ in range(100):  # a template may not mention what was changed
        text = _caption(_one_word_wrong(scene, rng), seed)
        if text != true and _differing_words(text, true) == 1:
            wrong[text] = None
        if len(wrong) == ONE_WORD:
            break
    swapped = _two_exchanged(scene, rng)
    return true, list(wrong), [] if swapped is None else [_caption(swapped, seed)]


def _caption(scene: Scene, seed: int) -> str:
    """Captions with equal seeds have the same template and the same order of objects."""
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
    """An absent kind with the same number of words, half of the time of the same category."""
    names = [
        n for n in CLASS_NAMES if n not in scene.classes and n.count(" ") == item.kind.count(" ")
    ]
    alike = [n for n in names if CLASSES[n].category == CLASSES[item.kind].category]
    return _one(rng, alike if alike and rng.random() < 0.5 else names)


def _two_exchanged(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """Swap two objects of different kinds, with their sizes."""
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
    """Number of positions at which two texts differ; -1 if their numbers of words differ."""
    left, right = a.lower().split(), b.lower().split()
    if len(left) != len(right):
        return -1
    return sum(x != y for x, y in zip(left, right, strict=True))


def _one(rng: np.random.Generator, names: list[str]) -> str:
    return names[int(rng.integers(len(names)))]
