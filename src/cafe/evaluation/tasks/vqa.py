"""Short answers to questions about images, by the VQA challenge's soft accuracy.

Rows as in lmms-lab/textvqa, lmms-lab/VQAv2, lmms-lab/OK-VQA (split "validation"): question_id,
image, question, and answers (of ten annotators, strings or {"answer": …}), or one answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from cafe.errors import DataError
from cafe.evaluation.asking import VisualQuestion, ask
from cafe.evaluation.datasets.rows import (
    RowIds,
    RowSource,
    check_unique,
    column,
    read_rows,
    row_image,
)
from cafe.evaluation.scoring import Ratio
from cafe.evaluation.task import Generate, ScoreExamples, TaskResult
from cafe.metrics import answer_accuracy, consensus_accuracy
from cafe.types import Image

INSTRUCTION = "\nAnswer the question using a single word or phrase."
MAX_NEW_TOKENS = 16
QUESTIONS_PER_BLOCK = 256


@dataclass(frozen=True, slots=True)
class VqaQuestion:
    """`answers`: those of several annotators, or the only accepted one."""

    id: str
    image: Image
    text: str
    answers: tuple[str, ...]


def vqa(
    score_examples: ScoreExamples, generate: Generate, questions: Iterable[VqaQuestion]
) -> TaskResult:
    """Ask all questions, a block at a time. Score: `vqa_accuracy`.

    With answers of several annotators it is the challenge's soft accuracy, with one answer exact
    match, both after normalisation (`cafe.metrics`). An empty reply is wrong, and the details
    count them.

    Raises:
        DataError: no questions, two with one id, or one without an answer.
    """
    ids: list[str] = []
    right: list[float] = []
    empty = 0
    remaining = iter(questions)
    while block := list(islice(remaining, QUESTIONS_PER_BLOCK)):
        asked = [VisualQuestion(q.image, q.text + INSTRUCTION, (_commonest(q),)) for q in block]
        replies = ask(score_examples, generate, asked, MAX_NEW_TOKENS)
        empty += sum(not reply.strip() for reply in replies)
        right += [_accuracy(reply, q.answers) for reply, q in zip(replies, block, strict=True)]
        ids += [q.id for q in block]
    if not ids:
        raise DataError("there are no questions")
    check_unique(ids, "VQA")
    return TaskResult(
        len(ids),
        {"accuracy": np.array(right)},
        {"vqa_accuracy": Ratio("accuracy")},
        ids=tuple(ids),
        details={"empty_replies": empty},
    )


def read_vqa(source: RowSource, limit: int | None = None) -> Iterator[VqaQuestion]:
    """Questions from rows in the layout above.

    Raises:
        DataError: as in `cafe.evaluation.datasets.rows`; a question without an answer, two with
        one id.
    """
    ids = RowIds(source)
    for number, row in enumerate(read_rows(source, "validation", limit)):
        named_by = next((n for n in ("question_id", "id") if row.get(n) is not None), "")
        name = str(row.get(named_by, number))
        ids.add(name, named_by, number)
        values = column(row, ("answers", "answer"), source)
        answers = tuple(_text(one) for one in (values if isinstance(values, list) else [values]))
        if not any(answer.strip() for answer in answers):
            raise DataError(f"{source}: question {name!r} has no answer")
        image = row_image(row.get("image"), source, f"question {name!r}")
        text = str(column(row, ("question",), source))
        # Annotators sometimes wrote nothing; that is not an answer to agree with.
        yield VqaQuestion(name, image, text, tuple(a for a in answers if a.strip()))


def _text(answer: Any) -> str:
    return str(answer["answer"] if isinstance(answer, dict) else answer)


def _commonest(question: VqaQuestion) -> str:
    return max(question.answers, key=question.answers.count)


def _accuracy(reply: str, answers: tuple[str, ...]) -> float:
    measure = consensus_accuracy if len(answers) > 1 else answer_accuracy
    return float(measure([reply], [answers])[0])
