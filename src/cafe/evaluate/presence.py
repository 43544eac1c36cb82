"""Short questions with exact answers, above all: is a thing in the picture or not?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cafe.data.scenes import Question
from cafe.errors import DataError
from cafe.evaluate.data import Picture
from cafe.evaluate.replies import Asked, ask
from cafe.evaluate.scoring import Ratio
from cafe.evaluate.task import Generate, Read, Result
from cafe.evaluate.teacher_forced import Answer
from cafe.metrics import answer_accuracy
from cafe.types import Conversation, Message, user

MAX_NEW_TOKENS = 16
"""An answer is a word or two."""


def presence(read: Read, generate: Generate, pictures: Sequence[Picture]) -> Result:
    """Ask all questions about all pictures. Scores: see `question_scores`.

    A question is right if greedy decoding gives its answer, up to `normalise_answer` ("Yes." for
    "yes" is). An empty reply is wrong.

    Raises:
        DataError: no picture has a question.
    """
    asked = [(picture, q) for picture in pictures for q in picture.questions]
    if not asked:
        raise DataError("no picture has a question; use a folder with a questions.json")
    replies = ask(
        read, generate, [Asked(p.image, q.text, _likely(q)) for p, q in asked], MAX_NEW_TOKENS
    )
    right = answer_accuracy(replies, [[q.answer] for _, q in asked]) == 1
    places = {picture.id: i for i, picture in enumerate(pictures)}
    of_picture = np.array([places[picture.id] for picture, _ in asked])
    result = question_scores([q for _, q in asked], right, of_picture)
    return replace(result, ids=tuple(picture.id for picture in pictures))


def _likely(question: Question) -> tuple[str, ...]:
    yes_or_no = ("yes", "no")
    return yes_or_no if question.answer in yes_or_no else (question.answer,)


def question_dialogues(picture: Picture) -> tuple[Conversation, ...]:
    """Each question about `picture` as a conversation of its own."""
    return tuple(
        (*user(picture.image, q.text), Message("assistant", (q.answer,))) for q in picture.questions
    )


def exact_matches(answers: Sequence[Sequence[Answer]]) -> np.ndarray:
    """Per question, picture by picture: would the model write exactly the given answer?"""
    return np.array([answer.greedy for of_picture in answers for answer in of_picture], dtype=bool)


def question_scores(
    questions: Sequence[Question], right: np.ndarray, of_picture: np.ndarray | None = None
) -> Result:
    """Accuracies from what was right.

    Scores: `question_accuracy` over all, `question_accuracy/<kind>` over those of one kind, and
    `presence_accuracy`, the same as that of the kind `presence`, where there are such questions.

    of_picture   the number of each question's picture, the sample; None: each question is one
    """
    owners = np.arange(len(questions)) if of_picture is None else of_picture
    count = int(owners.max()) + 1
    kinds = np.array([question.kind for question in questions])
    found = {"": np.ones(len(kinds), bool)} | {
        f"/{kind}": kinds == kind for kind in sorted(set(kinds.tolist()))
    }
    items, ratios = {}, {}
    for suffix, chosen in found.items():
        items[f"asked{suffix}"] = np.bincount(owners[chosen], minlength=count)
        items[f"right{suffix}"] = np.bincount(owners[chosen & right], minlength=count)
        ratios[f"question_accuracy{suffix}"] = Ratio(f"right{suffix}", f"asked{suffix}")
    if "/presence" in found:
        ratios["presence_accuracy"] = Ratio("right/presence", "asked/presence")
    return Result(len(questions), items, ratios)
