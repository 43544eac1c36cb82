"""The bundled world: images of OpenMoji glyphs, with captions, questions and the exact truth."""

from __future__ import annotations

from cafe.data.scenes.classes import CATEGORIES, CLASS_NAMES, CLASSES, COLOURS, ObjectClass
from cafe.data.scenes.language import caption, mentioned_classes
from cafe.data.scenes.questions import (
    PRESENCE_QUESTION,
    QUESTION_KINDS,
    SceneQuestion,
    questions,
)
from cafe.data.scenes.world import (
    BACKGROUNDS,
    PLACES,
    Scene,
    SceneObject,
    Split,
    draw,
    sample_scene,
)
from cafe.data.scenes.write import Truth, read_truth, write_scenes

__all__ = [
    "BACKGROUNDS",
    "CATEGORIES",
    "CLASSES",
    "CLASS_NAMES",
    "COLOURS",
    "PLACES",
    "PRESENCE_QUESTION",
    "QUESTION_KINDS",
    "ObjectClass",
    "Scene",
    "SceneObject",
    "SceneQuestion",
    "Split",
    "Truth",
    "caption",
    "draw",
    "mentioned_classes",
    "questions",
    "read_truth",
    "sample_scene",
    "write_scenes",
]
