"""THRONE (arXiv 2405.05256): judges read free descriptions and vote which classes they imply.

Per description and class three questions, by each of three judges: nine votes. A class is said if
all nine say yes, not said if none does, and otherwise taken out for that picture
(`cafe.metrics.throne_columns`). On COCO:

    folder/instances_val2017.json
    folder/val2017/000000000139.jpg
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cafe.errors import DataError
from cafe.evaluate.chair import Shown
from cafe.evaluate.coco import article, read_instances
from cafe.evaluate.describe import describe
from cafe.evaluate.journal import Journal
from cafe.evaluate.judges import Inquiry, Judge
from cafe.evaluate.sources import local_image
from cafe.evaluate.spread import Rank
from cafe.evaluate.task import Generate, Result
from cafe.metrics import judge_says_yes, throne_columns

PROMPT = "Describe this image in detail."
MAX_NEW_TOKENS = 1024
READ_CHARACTERS = 1024
"""So much of a description the judges read."""

_PLURAL = frozenset({"skis", "scissors"})
_SPOKEN = {"tie": "necktie"}


@dataclass(frozen=True, slots=True)
class Votes:
    """Per picture and class how many said yes, [n, c], of `each`; `evasive`: neither yes nor no."""

    yes: np.ndarray
    each: int
    evasive: int


def throne(
    generate: Generate,
    judges: Sequence[Judge],
    pictures: Sequence[Shown],
    classes: Sequence[str],
    *,
    prompt: str = PROMPT,
    max_new_tokens: int = MAX_NEW_TOKENS,
    journal: Journal | None = None,
    rank: Rank | None = None,
) -> Result:
    """Let the model describe each picture, and the judges read it.

    Scores: those of `cafe.metrics.throne_scores`, in both ways of averaging, and `evasive`, the
    share of replies of judges that are neither yes nor no (they count as no vote).

    Descriptions and replies that the journal has are not asked for again.

    Raises:
        DataError: no pictures, no classes or no judges; what a judge raises.
    """
    if not pictures or not classes or not judges:
        raise DataError("THRONE needs pictures, classes and at least one judge")
    journal, rank = journal or Journal(), rank or Rank()
    named = [(p.id, p.image) for p in pictures]
    texts = describe(generate, named, prompt, max_new_tokens, journal)
    votes = collect_votes(judges, texts, [p.id for p in pictures], classes, journal, rank)
    present = np.array([[name in p.objects for name in classes] for p in pictures])
    columns = throne_columns(votes.yes, present, votes=votes.each)
    asked = votes.each * votes.yes.size
    return Result(
        len(pictures),
        {name: _whole(column) for name, column in columns.items()},
        derived="throne",
        plain={"evasive": votes.evasive / asked},
        ids=tuple(p.id for p in pictures),
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

    A judge's replies are kept one by one as they come, so a judge that fails half way has lost
    nothing: the next run asks only for the rest.
    """

    def votes_on(numbers: Sequence[int]) -> list[tuple[list[int], int]]:
        return [_votes_on(judges, texts[i], ids[i], classes, journal) for i in numbers]

    found = rank.share(range(len(texts)), votes_on)
    yes = np.array([counts for counts, _ in found])
    return Votes(yes, 3 * len(judges), sum(evasive for _, evasive in found))


def inquiries(text: str, thing: str) -> list[Inquiry]:
    """The three questions about one class."""
    spoken = _SPOKEN.get(thing, thing)
    is_there = "Are there" if thing in _PLURAL else f"Is there {article(spoken)}"
    implied = f"{spoken} are" if thing in _PLURAL else f"{article(spoken)} {spoken} is"
    told = text[:READ_CHARACTERS]
    return [
        Inquiry(told, question, thing)
        for question in (
            f"Please answer yes or no. {is_there} {spoken} in this image?",
            f"{is_there} {spoken} in this image?",
            f"Please answer yes or no. Does the text imply {implied} in the image?",
        )
    ]


def read_throne(folder: Path, limit: int | None = None) -> tuple[list[Shown], tuple[str, ...]]:
    """COCO val2017 in the layout above: pictures, and the 80 classes.

    Raises:
        DataError: the annotations or a picture are missing.
    """
    truth = read_instances(folder / "instances_val2017.json")
    return [
        Shown(name, local_image(folder / "val2017", name, name), objects)
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
    """As integers, where nothing is lost by it: that is stored shorter."""
    return column.astype(np.int64) if np.all(column == np.floor(column)) else column
