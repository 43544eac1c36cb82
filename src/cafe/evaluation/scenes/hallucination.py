"""CHAIR, THRONE and POPE on the bundled world: every name is known, so judging is exact.

POPE has its three settings, and `all` asks for all kinds about every image. In the settings, as
many absent kinds are asked for as kinds are there, up to three of each:

    random        any kind
    popular       the kinds that most of the evaluated images show
    adversarial   look-alikes of what is there: the same category, if possible the same colour. (In
                  COCO, POPE takes what often appears next to it; in this world nothing does.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from cafe.data.scenes import CLASS_NAMES, CLASSES, PRESENCE_QUESTION
from cafe.data.scenes.classes import plural, with_article
from cafe.evaluation.datasets.object_words import ObjectWords
from cafe.evaluation.scenes.held_out import SceneItem, item_stream
from cafe.evaluation.task import Generate, TaskResult
from cafe.evaluation.tasks.caption import MAX_NEW_TOKENS
from cafe.evaluation.tasks.chair import AnnotatedImage, chair
from cafe.evaluation.tasks.judges import ExactJudge
from cafe.evaluation.tasks.pope import PopeQuestion
from cafe.evaluation.tasks.throne import throne
from cafe.types import CAPTION_REQUEST

MOST_PRESENT = 3
SCENE_WORDS = ObjectWords({form: name for name in CLASS_NAMES for form in (name, plural(name))})


def scenes_chair(generate: Generate, scenes: Sequence[SceneItem]) -> TaskResult:
    """CHAIR of captions of scenes; scores as in `cafe.evaluation.tasks.chair`."""
    return chair(
        generate,
        _shown(scenes),
        SCENE_WORDS.mentions,
        prompt=CAPTION_REQUEST,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def scenes_throne(generate: Generate, scenes: Sequence[SceneItem]) -> TaskResult:
    """THRONE of the same captions. The votes of the one exact judge always agree, so nothing is
    disqualified; scores as in `cafe.evaluation.tasks.throne`.
    """
    return throne(
        generate,
        [ExactJudge(SCENE_WORDS.mentions)],
        _shown(scenes),
        CLASS_NAMES,
        prompt=CAPTION_REQUEST,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def _shown(scenes: Sequence[SceneItem]) -> list[AnnotatedImage]:
    return [AnnotatedImage(item.id, item.image, frozenset(item.scene.classes)) for item in scenes]


def scene_questions(scenes: Sequence[SceneItem], *, every_kind: bool = False) -> list[PopeQuestion]:
    """The questions of the three settings; with `every_kind` those of the setting `all` instead."""
    if every_kind:
        return [_question("all", item, kind) for item in scenes for kind in CLASS_NAMES]
    shown = Counter(kind for item in scenes for kind in item.scene.classes)
    popular = sorted(CLASS_NAMES, key=lambda kind: -shown[kind])
    return [question for item in scenes for question in _of_scene(item, popular)]


def _of_scene(item: SceneItem, popular: Sequence[str]) -> Iterator[PopeQuestion]:
    rng = item_stream(item, 200)
    present = item.scene.classes[:MOST_PRESENT]
    absent = [kind for kind in CLASS_NAMES if kind not in item.scene.classes]
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
    """For each kind, the most similar absent one; none is used twice."""
    left = list(absent)
    chosen = []
    for kind in present:
        best = min(left, key=lambda other: _difference(kind, other))
        left.remove(best)
        chosen.append(best)
    return chosen


def _difference(kind: str, other: str) -> int:
    a, b = CLASSES[kind], CLASSES[other]
    return 2 * (a.category != b.category) + (a.colour != b.colour)


def _question(setting: str, item: SceneItem, kind: str) -> PopeQuestion:
    text = PRESENCE_QUESTION.format(thing=with_article(kind))
    return PopeQuestion(setting, item.id, item.image, text, kind in item.scene.classes)
