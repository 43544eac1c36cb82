"""CHAIR and THRONE on the bundled world: every name is known, so the judging is exact."""

from __future__ import annotations

from collections.abc import Sequence

from cafe.data.scenes import KIND_NAMES, PROMPT_CAPTION
from cafe.data.scenes.kinds import plural
from cafe.evaluate.caption import MAX_NEW_TOKENS
from cafe.evaluate.chair import Shown, chair
from cafe.evaluate.judges import ExactJudge
from cafe.evaluate.scene_set import SceneItem
from cafe.evaluate.task import Generate, Result
from cafe.evaluate.throne import throne
from cafe.evaluate.words import ObjectWords

SCENE_WORDS = ObjectWords({form: name for name in KIND_NAMES for form in (name, plural(name))})


def scenes_chair(generate: Generate, scenes: Sequence[SceneItem]) -> Result:
    """CHAIR of captions of scenes; scores as in `cafe.evaluate.chair`."""
    return chair(
        generate,
        _shown(scenes),
        SCENE_WORDS.mentions,
        prompt=PROMPT_CAPTION,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def scenes_throne(generate: Generate, scenes: Sequence[SceneItem]) -> Result:
    """THRONE of the same captions. One exact judge casts all votes alike, so nothing is
    disqualified; scores as in `cafe.evaluate.throne`.
    """
    return throne(
        generate,
        [ExactJudge(SCENE_WORDS.mentions)],
        _shown(scenes),
        KIND_NAMES,
        prompt=PROMPT_CAPTION,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def _shown(scenes: Sequence[SceneItem]) -> list[Shown]:
    return [Shown(item.id, item.image, frozenset(item.scene.kinds)) for item in scenes]
