"""Short questions with exact answers; most ask whether an object is in the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cafe.data.scenes import SceneQuestion
from cafe.errors import DataError
from cafe.evaluation.asking import VisualQuestion, ask
from cafe.evaluation.datasets.captioned import CaptionedImage
from cafe.evaluation.scoring import Ratio
from cafe.evaluation.task import Generate, ScoreExamples, TaskResult
from cafe.metrics import answer_accuracy
from cafe.model.teacher_forced import AnswerScore
from cafe.types import Conversation, Message, user

MAX_NEW_TOKENS = 16
"""An answer is a word or two."""


def presence(
    score_examples: ScoreExamples, generate: Generate, images: Sequence[CaptionedImage]
) -> TaskResult:
    """Ask all questions about all images. Scores: see `question_scores`.

    A question is right if greedy decoding gives its answer, up to `normalise_answer` ("Yes." equals
    "yes"). An empty reply is wrong.

    Raises:
        DataError: no image has a question.
    """
    asked = [(image, q) for image in images for q in image.questions]
    if not asked:
        raise DataError("no image has a question; use a folder with a questions.json")
    replies = ask(
        score_examples,
        generate,
        [VisualQuestion(p.image, q.text, _likely(q)) for p, q in asked],
        MAX_NEW_TOKENS,
    )
    right = answer_accuracy(replies, [[q.answer] for _, q in asked]) == 1
    index_of = {image.id: i for i, image in enumerate(images)}
    of_image = np.array([index_of[image.id] for image, _ in asked])
    result = question_scores([q for _, q in asked], right, of_image)
    return replace(result, ids=tuple(image.id for image in images))


def _likely(question: SceneQuestion) -> tuple[str, ...]:
    yes_or_no = ("yes", "no")
    return yes_or_no if question.answer in yes_or_no else (question.answer,)


def question_dialogues(image: CaptionedImage) -> tuple[Conversation, ...]:
    """Each question about `image` as a separate conversation."""
    return tuple(
        (*user(image.image, q.text), Message("assistant", (q.answer,))) for q in image.questions
    )


def exact_matches(answers: Sequence[Sequence[AnswerScore]]) -> np.ndarray:
    """Per question, image by image: would greedy decoding write exactly the reference answer?"""
    return np.array([answer.greedy for of_image in answers for answer in of_image], dtype=bool)


def question_scores(
    questions: Sequence[SceneQuestion], right: np.ndarray, of_image: np.ndarray | None = None
) -> TaskResult:
    """Accuracies from which answers are right.

    Scores: `question_accuracy` over all, `question_accuracy/<kind>` over those of one kind, and
    `presence_accuracy`, the same as that of the kind `presence`, where there are such questions.

    Args:
        questions: All questions.
        right: Whether each was answered correctly, [n].
        of_image: Index of each question's image, which is the sample; None: each question is a
            sample of its own.
    """
    owners = np.arange(len(questions)) if of_image is None else of_image
    count = int(owners.max()) + 1
    kinds = np.array([question.kind for question in questions])
    groups = {"": np.ones(len(kinds), bool)} | {
        f"/{kind}": kinds == kind for kind in sorted(set(kinds.tolist()))
    }
    items, ratios = {}, {}
    for suffix, chosen in groups.items():
        items[f"asked{suffix}"] = np.bincount(owners[chosen], minlength=count)
        items[f"right{suffix}"] = np.bincount(owners[chosen & right], minlength=count)
        ratios[f"question_accuracy{suffix}"] = Ratio(f"right{suffix}", f"asked{suffix}")
    if "/presence" in groups:
        ratios["presence_accuracy"] = Ratio("right/presence", "asked/presence")
    return TaskResult(len(questions), items, ratios)
