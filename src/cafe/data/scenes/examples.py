"""Scenes without end, for pretraining: drawn when asked for, never written."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from cafe.data.scenes.draw import draw
from cafe.data.scenes.language import PROMPT_CAPTION, caption
from cafe.data.scenes.questions import questions
from cafe.data.scenes.world import Split, random_stream, sample_scene, scene_seed
from cafe.types import Conversation, Example, Image, Message


def scene_examples(
    seed: int, split: Split = "train", questions_per_scene: int = 8
) -> Iterator[Example]:
    """Examples without end: per scene one caption dialogue and one dialogue per question.

    Their scenes are those that `write_scenes` writes for the same seed and split.
    """
    for index in count():
        yield scene_example(scene_seed(seed, index), split, questions_per_scene)


def scene_example(seed: int, split: Split = "train", questions_per_scene: int = 8) -> Example:
    """The example of one scene's own seed. It has dialogues only, no contrastive pair."""
    scene = sample_scene(seed, split)
    rng = random_stream(seed, split, "language")
    picture = Image(draw(scene))  # one object: its dialogues are branches of one row
    turns = [(PROMPT_CAPTION, caption(scene, rng))]
    turns += [(q.text, q.answer) for q in questions(scene, rng, questions_per_scene)]
    dialogues = tuple(_dialogue(picture, prompt, answer) for prompt, answer in turns)
    return Example(id=f"{split}-{seed}", dialogues=dialogues)


def _dialogue(picture: Image, prompt: str, answer: str) -> Conversation:
    return Message("user", (picture, prompt)), Message("assistant", (answer,))
