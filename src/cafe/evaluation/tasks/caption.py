"""Captions: the likelihood of the references, and the model's own captions against the truth.

Two tasks. `caption` scores the reference captions (loss) and the objects that the model's captions
name. `captioning` compares the model's captions with the references by CIDEr-D and BLEU (computed
in `cafe.metrics.captions`); its images and references are those of the retrieval task, in the same
layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import numpy as np

from cafe.data.scenes import mentioned_classes
from cafe.errors import DataError
from cafe.evaluation.asking import describe
from cafe.evaluation.datasets.captioned import CaptionedImage
from cafe.evaluation.datasets.rows import check_unique
from cafe.evaluation.journal import Journal
from cafe.evaluation.scoring import Ratio
from cafe.evaluation.task import Generate, ScoreExamples, TaskResult
from cafe.metrics import bleu_columns, caption_words, cider_d, object_columns
from cafe.model.teacher_forced import AnswerScore
from cafe.types import Conversation, Example

PROMPT = "Provide a one-sentence caption for the provided image."
"""What `captioning` asks; `caption` asks as the data set does."""
MAX_NEW_TOKENS = 64
"""Longer than any caption of the bundled world; a runaway caption is cut here."""


def caption(
    score_examples: ScoreExamples, generate: Generate, images: Sequence[CaptionedImage]
) -> TaskResult:
    """The caption loss, and the object scores where all images have object annotations."""
    loss = replace(caption_loss(score_examples, images), ids=tuple(p.id for p in images))
    if any(image.kinds is None for image in images):
        return loss
    objects = caption_objects(generate, images)
    return replace(loss, items=loss.items | objects.items, ratios=loss.ratios | objects.ratios)


def caption_prompt(image: CaptionedImage) -> Conversation:
    """The prompt for a caption of `image`: its first dialogue up to the answer."""
    return tuple(takewhile(lambda message: message.role != "assistant", image.dialogues[0]))


def caption_loss(score_examples: ScoreExamples, images: Sequence[CaptionedImage]) -> TaskResult:
    """Negative log-likelihood of the reference captions. Score: `caption_loss`, nats per token.

    Raises:
        DataError: what the collator raises.
    """
    examples = [Example(id=p.id, dialogues=p.dialogues) for p in images]
    return caption_loss_scores([reading.answers for reading in score_examples(examples)])


def caption_loss_scores(captions: Sequence[Sequence[AnswerScore]]) -> TaskResult:
    """The caption loss from the teacher-forced scores of each image's captions."""
    nats = np.array([sum(a.nll_nats for a in answers) for answers in captions])
    tokens = np.array([sum(a.tokens for a in answers) for answers in captions])
    return TaskResult(
        len(captions),
        {"caption_nats": nats, "caption_tokens": tokens},
        {"caption_loss": Ratio("caption_nats", "caption_tokens")},
    )


def caption_objects(generate: Generate, images: Sequence[CaptionedImage]) -> TaskResult:
    """Ask for a caption of each image; compare the object kinds that it names with those shown.

    Scores: `caption_object_precision`, `…_recall`, `…_f1`, from counts summed over images.

    Raises:
        DataError: an image without object annotations.
    """
    unknown = next((p.id for p in images if p.kinds is None), None)
    if unknown is not None:
        raise DataError(f"image {unknown!r}: it has no object annotations; use a scenes folder")
    texts = generate([caption_prompt(image) for image in images], MAX_NEW_TOKENS)
    named = [mentioned_classes(text) for text in texts]
    shown = [image.kinds or frozenset() for image in images]
    items = object_columns(named, shown)
    ratios = {
        "caption_object_precision": Ratio("objects_right", "objects_named"),
        "caption_object_recall": Ratio("objects_right", "objects_shown"),
        "caption_object_f1": Ratio("objects_right_twice", "objects_named_and_shown"),
    }
    return TaskResult(len(images), items, ratios)


def captioning(
    generate: Generate,
    images: Sequence[CaptionedImage],
    *,
    prompt: str = PROMPT,
    journal: Journal | None = None,
) -> TaskResult:
    """Ask for a caption of each image. Scores: `cider_d`, in [0, 10], and `bleu1` to `bleu4`.

    CIDEr-D weights words by how few of these images' references contain them, so its value on a
    part of a data set differs from that on the whole; its interval keeps those weights fixed.

    Raises:
        DataError: no images, or two with one id.
    """
    if not images:
        raise DataError("there are no images to caption")
    check_unique([image.id for image in images], "captioning")
    shown = [(image.id, image.image) for image in images]
    texts = describe(generate, shown, prompt, MAX_NEW_TOKENS, journal)
    said = [caption_words(text) for text in texts]
    references = [[caption_words(text) for text in image.captions] for image in images]
    columns = bleu_columns(said, references)
    items = {name: column.astype(np.int64) for name, column in columns.items()}
    return TaskResult(
        len(images),
        {**items, "cider_d": cider_d(said, references)},
        {"cider_d": Ratio("cider_d")},
        derived="bleu",
        ids=tuple(image.id for image in images),
        details={"empty_replies": sum(not words for words in said)},
    )
