"""All scene tasks in a single pass, for before-and-after tables: each image is encoded once.

The embeddings of image and caption, the caption loss and all questions are branches of one packed
row (prefix sharing); only the captions are actually generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cafe.errors import DataError
from cafe.evaluation.datasets.captioned import CaptionedImage
from cafe.evaluation.task import Encode, Generate, ScoreExamples
from cafe.evaluation.tasks.caption import (
    MAX_NEW_TOKENS,
    caption_loss_scores,
    caption_objects,
    caption_prompt,
)
from cafe.evaluation.tasks.gap import gap_scores
from cafe.evaluation.tasks.presence import exact_matches, question_dialogues, question_scores
from cafe.evaluation.tasks.retrieval import caption_indices, retrieval_scores
from cafe.metrics import first_relevant_ranks
from cafe.model.captions import CAPTION_WEIGHT, with_captions
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
"""The scores of a before-and-after table, in its order."""


@dataclass(frozen=True, slots=True)
class SceneScores:
    """The scores of all tasks, and the embeddings they are computed from.

    scores              exactly `SCORES`
    question_accuracy   the accuracy of each kind of question
    images, captions    unit embeddings, float32 [n, d]; row i of both is one scene
    """

    scores: Scores
    question_accuracy: Scores
    images: Float[np.ndarray, "n d"]
    captions: Float[np.ndarray, "n d"]


def evaluate_scenes(
    read: ScoreExamples, generate: Generate, scenes: Sequence[CaptionedImage]
) -> SceneScores:
    """Run all scene tasks.

    A question counts as correct if greedy decoding produces exactly its answer; the task `presence`
    is more lenient with models that phrase their answers differently.

    Args:
        read: Scores examples with teacher forcing.
        generate: Generates the captions.
        scenes: Images with one caption each and known object classes.

    Returns:
        The scores, and the embeddings for the maps.

    Raises:
        DataError: fewer than two scenes, or one without exactly one caption or without the truth.
    """
    if len(scenes) < 2 or any(len(p.captions) != 1 or p.kinds is None for p in scenes):
        raise DataError("at least two scenes are needed; write them with `cafe data scenes`")
    outputs = read([_full_example(image) for image in scenes])
    images = _unit_rows([output.query for output in outputs])
    captions = _unit_rows([output.target for output in outputs])
    own = caption_indices(scenes)
    questions = question_scores(
        [question for image in scenes for question in image.questions],
        exact_matches([output.answers[1:] for output in outputs]),
    ).scores
    scores = (
        retrieval_scores(images, captions, own).scores
        | questions
        | caption_loss_scores([output.answers[:1] for output in outputs]).scores
        | caption_objects(generate, scenes).scores
        | gap_scores(images, captions, own).scores
    )
    prefix = "question_accuracy/"
    return SceneScores(
        scores={name: scores[name] for name in SCORES},
        question_accuracy={
            name.removeprefix(prefix): value
            for name, value in questions.items()
            if name.startswith(prefix)
        },
        images=images,
        captions=captions,
    )


@dataclass(frozen=True, slots=True)
class CaptionedScores:
    """Of images that are embedded with the captions the model writes.

    scores   retrieval and gap
    images   unit embeddings, float32 [n, d]
    written  the captions; empty where the model says nothing
    """

    scores: Scores
    images: Float[np.ndarray, "n d"]
    written: list[str]


def captioned_scores(
    encode: Encode, generate: Generate, scenes: Sequence[CaptionedImage], alone: SceneScores
) -> CaptionedScores:
    """Retrieval scores and gap of images that are embedded with the captions the model writes.

    Args:
        encode: Embeds the captions.
        generate: Writes them.
        scenes: As for `evaluate_scenes`.
        alone: What that has returned for these scenes.
    """
    written = generate([caption_prompt(scene) for scene in scenes], MAX_NEW_TOKENS)
    said = [i for i, text in enumerate(written) if text]
    images = alone.images
    if said:
        texts = torch.from_numpy(encode([written[i] for i in said]))
        images = with_captions(torch.from_numpy(images), texts, said, CAPTION_WEIGHT).numpy()
    own = caption_indices(scenes)
    scores = (
        retrieval_scores(images, alone.captions, own).scores
        | gap_scores(images, alone.captions, own).scores
    )
    chosen = {name: scores[name] for name in SCORES if name in scores}
    return CaptionedScores(chosen, images, written)


def mended_search(
    alone: Float[np.ndarray, "n d"],
    captioned: Float[np.ndarray, "n d"],
    texts: Float[np.ndarray, "n d"],
) -> int | None:
    """The search that the images' own embeddings get most wrong and those with captions right.

    Args:
        alone: embeddings of the images.
        captioned: the same with the model's captions.
        texts: of what is searched for; row i of all is one scene.

    Returns:
        The row whose image has the worst rank alone and is first with captions; None: there is
        none.
    """
    own = [[i] for i in range(len(texts))]
    before = first_relevant_ranks(texts, alone, own)
    after = first_relevant_ranks(texts, captioned, own)
    worst = np.where(after == 1, before, 0)
    return int(worst.argmax()) if worst.max(initial=0) > 1 else None


def _full_example(image: CaptionedImage) -> Example:
    """One example with the pair, the caption as an answer, and all questions, in this order."""
    return Example(
        id=image.id,
        query=user(image.image),
        target=user(image.captions[0]),
        dialogues=(*image.dialogues, *question_dialogues(image)),
    )


def _unit_rows(embeddings: Sequence[np.ndarray | None]) -> Float[np.ndarray, "n d"]:
    stacked = np.stack([e for e in embeddings if e is not None])
    return stacked / np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), 1e-12)
