"""scenes-pope: POPE's three settings on the bundled world, and all kinds for every picture.

As many absent kinds are asked for as kinds are there, up to three of each:

    random        any kind
    popular       the kinds that most of the evaluated pictures show
    adversarial   look-alikes of what is there: the same category, if possible the same colour. (In
                  COCO, POPE takes what often stands beside it; in this world nothing does.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from cafe.data.scenes import KIND_NAMES, KINDS, PRESENCE_QUESTION
from cafe.data.scenes.kinds import with_article
from cafe.evaluate.pope import PopeQuestion
from cafe.evaluate.scene_set import SceneItem, item_stream

MOST_PRESENT = 3


def scene_questions(scenes: Sequence[SceneItem], *, every_kind: bool = False) -> list[PopeQuestion]:
    """The questions of the three settings; with `every_kind` those of the setting `all` instead."""
    if every_kind:
        return [_question("all", item, kind) for item in scenes for kind in KIND_NAMES]
    shown = Counter(kind for item in scenes for kind in item.scene.kinds)
    popular = sorted(KIND_NAMES, key=lambda kind: -shown[kind])
    return [question for item in scenes for question in _of_scene(item, popular)]


def _of_scene(item: SceneItem, popular: Sequence[str]) -> Iterator[PopeQuestion]:
    rng = item_stream(item, 200)
    present = item.scene.kinds[:MOST_PRESENT]
    absent = [kind for kind in KIND_NAMES if kind not in item.scene.kinds]
    shuffled = [absent[i] for i in rng.permutation(len(absent)).tolist()]
    wrong = {
        "random": shuffled[: len(present)],
        "popular": [kind for kind in popular if kind in absent][: len(present)],
        "adversarial": _look_alikes(present, shuffled),
    }
    for setting, kinds in wrong.items():
        for there, missing in zip(present, kinds, strict=True):
            yield _question(setting, item, there)
            yield _question(setting, item, missing)


def _look_alikes(present: Sequence[str], absent: Sequence[str]) -> list[str]:
    """For each kind the absent one that is most like it, none twice."""
    left = list(absent)
    chosen = []
    for kind in present:
        best = min(left, key=lambda other: _difference(kind, other))
        left.remove(best)
        chosen.append(best)
    return chosen


def _difference(kind: str, other: str) -> int:
    a, b = KINDS[kind], KINDS[other]
    return 2 * (a.category != b.category) + (a.colour != b.colour)


def _question(setting: str, item: SceneItem, kind: str) -> PopeQuestion:
    text = PRESENCE_QUESTION.format(thing=with_article(kind))
    return PopeQuestion(setting, item.id, item.image, text, kind in item.scene.kinds)
