"""The bundled world: pictures of OpenMoji things, captions, questions, and the exact truth."""

from __future__ import annotations

from cafe.data.scenes.draw import draw
from cafe.data.scenes.examples import scene_example, scene_examples
from cafe.data.scenes.kinds import CATEGORIES, COLOURS, KIND_NAMES, KINDS, Kind
from cafe.data.scenes.language import PROMPT_CAPTION, caption, mentioned_kinds
from cafe.data.scenes.questions import (
    MATCH_QUESTION,
    PRESENCE_QUESTION,
    QUESTION_KINDS,
    Question,
    questions,
)
from cafe.data.scenes.world import BACKGROUNDS, PLACES, Scene, SceneObject, Split, sample_scene
from cafe.data.scenes.write import Truth, read_truth, write_scenes

__all__ = [
    "BACKGROUNDS",
    "CATEGORIES",
    "COLOURS",
    "KINDS",
    "KIND_NAMES",
    "MATCH_QUESTION",
    "PLACES",
    "PRESENCE_QUESTION",
    "PROMPT_CAPTION",
    "QUESTION_KINDS",
    "Kind",
    "Question",
    "Scene",
    "SceneObject",
    "Split",
    "Truth",
    "caption",
    "draw",
    "mentioned_kinds",
    "questions",
    "read_truth",
    "sample_scene",
    "scene_example",
    "scene_examples",
    "write_scenes",
]
