"""All tasks on scenes in one go, for before-and-after tables: each picture is read once.

The picture's embedding, its caption's, the caption loss and all questions are branches of one row;
only the captions are really generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cafe.errors import DataError
from cafe.evaluate.caption import caption_loss_scores, caption_objects
from cafe.evaluate.data import Picture
from cafe.evaluate.gap import gap_scores
from cafe.evaluate.presence import exact_matches, question_dialogues, question_scores
from cafe.evaluate.retrieval import caption_indices, retrieval_scores
from cafe.evaluate.task import Generate, Read
from cafe.types import Example, Scores, user

if TYPE_CHECKING:
    from jaxtyping import Float

SCORES = (
    "image_to_text_recall@1",
    "image_to_text_recall@5",
    "text_to_image_recall@1",
    "text_to_image_recall@5",
    "presence_accuracy",
    "question_accuracy",
    "caption_loss",
    "caption_object_f1",
    "modality_gap",
)
"""What a before-and-after table shows, in its order."""


@dataclass(frozen=True, slots=True)
class SceneScores:
    """What all tasks found.

    scores              exactly `SCORES`
    question_accuracy   the same accuracy per kind of question
    images, captions    unit embeddings, float32 [n, d]; row i of both is one scene
    """

    scores: Scores
    question_accuracy: Scores
    images: Float[np.ndarray, "n d"]
    captions: Float[np.ndarray, "n d"]


def evaluate_scenes(read: Read, generate: Generate, pictures: Sequence[Picture]) -> SceneScores:
    """Measure everything on scenes.

    A question counts as right if greedy decoding writes exactly its answer; the task `presence`
    is more lenient with models that answer in other forms.

    Raises:
        DataError: fewer than two pictures, or one that has not one caption and the truth.
    """
    if len(pictures) < 2 or any(len(p.captions) != 1 or p.kinds is None for p in pictures):
        raise DataError("scenes are needed, at least two: write them with `cafe data scenes`")
    readings = read([_everything(picture) for picture in pictures])
    images = _units([reading.query for reading in readings])
    captions = _units([reading.target for reading in readings])
    own = caption_indices(pictures)
    questions = question_scores(
        [question for picture in pictures for question in picture.questions],
        exact_matches([reading.answers[1:] for reading in readings]),
    ).scores
    found = (
        retrieval_scores(images, captions, own).scores
        | questions
        | caption_loss_scores([reading.answers[:1] for reading in readings]).scores
        | caption_objects(generate, pictures).scores
        | gap_scores(images, captions, own).scores
    )
    prefix = "question_accuracy/"
    return SceneScores(
        scores={name: found[name] for name in SCORES},
        question_accuracy={
            name.removeprefix(prefix): value
            for name, value in questions.items()
            if name.startswith(prefix)
        },
        images=images,
        captions=captions,
    )


def _everything(picture: Picture) -> Example:
    """The pair, the caption as an answer, and then all questions."""
    return Example(
        id=picture.id,
        query=user(picture.image),
        target=user(picture.captions[0]),
        dialogues=(*picture.dialogues, *question_dialogues(picture)),
    )


def _units(embeddings: Sequence[np.ndarray | None]) -> Float[np.ndarray, "n d"]:
    stacked = np.stack([e for e in embeddings if e is not None])
    return stacked / np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), 1e-12)
