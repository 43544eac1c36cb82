"""Short answers to questions about pictures, by the VQA challenge's soft accuracy.

Rows as in lmms-lab/textvqa, lmms-lab/VQAv2, lmms-lab/OK-VQA (split "validation"): question_id,
image, question, and answers (of ten people, strings or {"answer": …}), or one answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from cafe.errors import DataError
from cafe.evaluate.replies import Asked, ask
from cafe.evaluate.scoring import Ratio
from cafe.evaluate.sources import RowIds, Source, check_unique, column, read_rows, row_image
from cafe.evaluate.task import Generate, Read, Result
from cafe.metrics import answer_accuracy, consensus_accuracy
from cafe.types import Image

INSTRUCTION = "\nAnswer the question using a single word or phrase."
MAX_NEW_TOKENS = 16
QUESTIONS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class VqaQuestion:
    """`answers` are those of several people, or the one that is accepted."""

    id: str
    image: Image
    text: str
    answers: tuple[str, ...]


def vqa(read: Read, generate: Generate, questions: Iterable[VqaQuestion]) -> Result:
    """Ask all questions, a block at a time. Score: `vqa_accuracy`.

    With answers of several people it is the challenge's soft accuracy, with one exact match, both
    after normalisation (`cafe.metrics`). An empty reply is wrong, and counted in the details.

    Raises:
        DataError: no questions, two with one id, or one without an answer.
    """
    ids: list[str] = []
    right: list[float] = []
    empty = 0
    remaining = iter(questions)
    while block := list(islice(remaining, QUESTIONS_AT_ONCE)):
        asked = [Asked(q.image, q.text + INSTRUCTION, (_commonest(q),)) for q in block]
        replies = ask(read, generate, asked, MAX_NEW_TOKENS)
        empty += sum(not reply.strip() for reply in replies)
        right += [_accuracy(reply, q.answers) for reply, q in zip(replies, block, strict=True)]
        ids += [q.id for q in block]
    if not ids:
        raise DataError("there are no questions")
    check_unique(ids, "VQA")
    return Result(
        len(ids),
        {"accuracy": np.array(right)},
        {"vqa_accuracy": Ratio("accuracy")},
        ids=tuple(ids),
        details={"empty_replies": empty},
    )


def read_vqa(source: Source, limit: int | None = None) -> Iterator[VqaQuestion]:
    """Questions from rows in the layout above.

    Raises:
        DataError: as in `cafe.evaluate.sources`; a question without an answer, two with one id.
    """
    ids = RowIds(source)
    for number, row in enumerate(read_rows(source, "validation", limit)):
        named_by = next((n for n in ("question_id", "id") if row.get(n) is not None), "")
        name = str(row.get(named_by, number))
        ids.add(name, named_by, number)
        found = column(row, ("answers", "answer"), source)
        answers = tuple(_text(one) for one in (found if isinstance(found, list) else [found]))
        if not any(answer.strip() for answer in answers):
            raise DataError(f"{source}: question {name!r} has no answer")
        image = row_image(row.get("image"), source, f"question {name!r}")
        text = str(column(row, ("question",), source))
        # People sometimes wrote nothing; that is no answer to agree with.
        yield VqaQuestion(name, image, text, tuple(a for a in answers if a.strip()))


def _text(answer: Any) -> str:
    return str(answer["answer"] if isinstance(answer, dict) else answer)


def _commonest(question: VqaQuestion) -> str:
    return max(question.answers, key=question.answers.count)


def _accuracy(reply: str, answers: tuple[str, ...]) -> float:
    measure = consensus_accuracy if len(answers) > 1 else answer_accuracy
    return float(measure([reply], [answers])[0])
