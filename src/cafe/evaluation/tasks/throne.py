"""THRONE (arXiv 2405.05256): judges vote on which classes a free description implies.

Each of three judges answers three questions per description and class: nine votes. A class counts
as mentioned if all nine are yes, as not mentioned if none is, and is otherwise excluded for that
image (`cafe.metrics.throne_columns`). On COCO:

    folder/instances_val2017.json
    folder/val2017/000000000139.jpg
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cafe.errors import DataError
from cafe.evaluation.asking import describe
from cafe.evaluation.datasets.coco import article, read_instances
from cafe.evaluation.datasets.rows import local_image
from cafe.evaluation.journal import Journal
from cafe.evaluation.task import Generate, TaskResult
from cafe.evaluation.tasks.chair import AnnotatedImage
from cafe.evaluation.tasks.judges import Inquiry, Judge
from cafe.metrics import judge_says_yes, throne_columns
from cafe.ranks import Rank

PROMPT = "Describe this image in detail."
MAX_NEW_TOKENS = 1024
READ_CHARACTERS = 1024
"""Length of the part of a description that the judges read."""

_PLURAL = frozenset({"skis", "scissors"})
_SPOKEN = {"tie": "necktie"}


@dataclass(frozen=True, slots=True)
class Votes:
    """Votes of all judges.

    yes       number of yes votes per image and class, [n, c]
    each      number of votes per image and class
    evasive   number of replies that are neither yes nor no
    """

    yes: np.ndarray
    each: int
    evasive: int


def throne(
    generate: Generate,
    judges: Sequence[Judge],
    images: Sequence[AnnotatedImage],
    classes: Sequence[str],
    *,
    prompt: str = PROMPT,
    max_new_tokens: int = MAX_NEW_TOKENS,
    journal: Journal | None = None,
    rank: Rank | None = None,
) -> TaskResult:
    """Have the model describe each image, and the judges read the descriptions.

    Scores: those of `cafe.metrics.throne_summary`, in both ways of averaging, and `evasive`, the
    share of replies of judges that are neither yes nor no (they count as no vote).

    Descriptions and replies in the journal are not requested again.

    Raises:
        DataError: no images, no classes or no judges; what a judge raises.
    """
    if not images or not classes or not judges:
        raise DataError("THRONE needs images, classes and at least one judge")
    journal, rank = journal or Journal(), rank or Rank()
    named = [(p.id, p.image) for p in images]
    texts = describe(generate, named, prompt, max_new_tokens, journal)
    votes = collect_votes(judges, texts, [p.id for p in images], classes, journal, rank)
    present = np.array([[name in p.objects for name in classes] for p in images])
    columns = throne_columns(votes.yes, present, votes=votes.each)
    asked = votes.each * votes.yes.size
    return TaskResult(
        len(images),
        {name: _whole(column) for name, column in columns.items()},
        derived="throne",
        plain={"evasive": votes.evasive / asked},
        ids=tuple(p.id for p in images),
        details={
            "judges": [judge.name for judge in judges],
            "evasive_replies": votes.evasive,
            "empty_replies": sum(not text.strip() for text in texts),
        },
    )


def collect_votes(
    judges: Sequence[Judge],
    texts: Sequence[str],
    ids: Sequence[str],
    classes: Sequence[str],
    journal: Journal,
    rank: Rank,
) -> Votes:
    """Ask every judge every question about every description.

    Each reply is kept as soon as it arrives, so nothing is lost when a judge fails half way: the
    next run asks only for the rest.
    """

    def votes_on(numbers: Sequence[int]) -> list[tuple[list[int], int]]:
        return [_votes_on(judges, texts[i], ids[i], classes, journal) for i in numbers]

    results = rank.share(range(len(texts)), votes_on)
    yes = np.array([counts for counts, _ in results])
    return Votes(yes, 3 * len(judges), sum(evasive for _, evasive in results))


def inquiries(text: str, thing: str) -> list[Inquiry]:
    """The three questions about one class."""
    spoken = _SPOKEN.get(thing, thing)
    is_there = "Are there" if thing in _PLURAL else f"Is there {article(spoken)}"
    implied = f"{spoken} are" if thing in _PLURAL else f"{article(spoken)} {spoken} is"
    excerpt = text[:READ_CHARACTERS]
    return [
        Inquiry(excerpt, question, thing)
        for question in (
            f"Please answer yes or no. {is_there} {spoken} in this image?",
            f"{is_there} {spoken} in this image?",
            f"Please answer yes or no. Does the text imply {implied} in the image?",
        )
    ]


def read_throne(
    folder: Path, limit: int | None = None
) -> tuple[list[AnnotatedImage], tuple[str, ...]]:
    """COCO val2017 in the layout above: images, and the 80 classes.

    Raises:
        DataError: the annotations or an image are missing.
    """
    truth = read_instances(folder / "instances_val2017.json")
    return [
        AnnotatedImage(name, local_image(folder / "val2017", name, name), objects)
        for name, objects in list(truth.objects.items())[:limit]
    ], truth.classes


def _votes_on(
    judges: Sequence[Judge], text: str, id: str, classes: Sequence[str], journal: Journal
) -> tuple[list[int], int]:
    asked = [one for thing in classes for one in inquiries(text, thing)]
    yes, evasive = np.zeros(len(asked), dtype=int), 0
    for judge in judges:
        keys = [("judge", judge.name, id, one.prompt) for one in asked]
        missing = [i for i, key in enumerate(keys) if key not in journal]
        replies = iter(judge([asked[i] for i in missing]) if missing else ())
        for i in missing:
            journal.put(keys[i], _next_reply(replies, judge))
        answers = [str(journal[key]) for key in keys]
        yes += [judge_says_yes(answer) for answer in answers]
        evasive += sum(answer.lower().strip() not in ("yes", "no") for answer in answers)
    return yes.reshape(len(classes), 3).sum(axis=1).tolist(), evasive


def _next_reply(replies: Iterator[str], judge: Judge) -> str:
    try:
        return next(replies)
    except StopIteration:
        raise DataError(f"judge {judge.name!r} gave fewer replies than it was asked for") from None


def _whole(column: np.ndarray) -> np.ndarray:
    """As integers where that is exact: they take less space in the result file."""
    return column.astype(np.int64) if np.all(column == np.floor(column)) else column
