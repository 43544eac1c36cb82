"""Short questions with exact answers, above all: is a thing in the picture or not?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cafe.data.scenes import Question
from cafe.errors import DataError
from cafe.evaluate.data import Picture
from cafe.evaluate.task import Generate, Read, Result
from cafe.evaluate.teacher_forced import Answer
from cafe.metrics import answer_accuracy
from cafe.types import Conversation, Example, Message, user

MAX_NEW_TOKENS = 16
"""An answer is a word or two."""


def presence(read: Read, generate: Generate, pictures: Sequence[Picture]) -> Result:
    """Ask all questions about all pictures. Scores: see `question_scores`.

    A question is right if greedy decoding gives its answer, up to `normalise_answer`. Where the
    model would write exactly the given answer, reading tells; only the other questions are
    really asked, as their answer may still be the same in another form ("Yes." for "yes").

    Raises:
        DataError: no picture has a question.
    """
    asked = [(picture, q) for picture in pictures for q in picture.questions]
    if not asked:
        raise DataError("no picture has a question; use a folder with a questions.json")
    with_questions = [p for p in pictures if p.questions]
    examples = [Example(id=p.id, dialogues=question_dialogues(p)) for p in with_questions]
    right = exact_matches([reading.answers for reading in read(examples)])
    other = np.flatnonzero(~right)
    if len(other):
        replies = generate(
            [user(asked[i][0].image, asked[i][1].text) for i in other], MAX_NEW_TOKENS
        )
        right[other] = answer_accuracy(replies, [[asked[i][1].answer] for i in other]) == 1
    return question_scores([q for _, q in asked], right)


def question_dialogues(picture: Picture) -> tuple[Conversation, ...]:
    """Each question about `picture` as a conversation of its own."""
    return tuple(
        (*user(picture.image, q.text), Message("assistant", (q.answer,))) for q in picture.questions
    )


def exact_matches(answers: Sequence[Sequence[Answer]]) -> np.ndarray:
    """Per question, picture by picture: would the model write exactly the given answer?"""
    return np.array([answer.greedy for of_picture in answers for answer in of_picture], dtype=bool)


def question_scores(questions: Sequence[Question], right: np.ndarray) -> Result:
    """Accuracies from what was right.

    Scores: `question_accuracy` over all, `question_accuracy/<kind>` over those of one kind, and
    `presence_accuracy`, the same as that of the kind `presence`, where there are such questions.
    """
    kinds = np.array([question.kind for question in questions])
    scores = {"question_accuracy": float(right.mean())}
    for kind in sorted(set(kinds.tolist())):
        scores[f"question_accuracy/{kind}"] = float(right[kinds == kind].mean())
    if "presence" in kinds:
        scores["presence_accuracy"] = scores["question_accuracy/presence"]
    return Result(scores, len(questions), {"question_right": right.astype(np.float64)})
