"""Short answers: when two are equal, the accuracies based on that, and calibration of yes or no.

The rules for "the same" follow the VQA challenge: case, articles, punctuation and apostrophes do
not count, and small numbers in words are digits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cafe.errors import DataError

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Bool, Float

__all__ = [
    "CALIBRATION_BINS",
    "answer_accuracy",
    "calibration_columns",
    "calibration_summary",
    "consensus_accuracy",
    "normalise_answer",
]

_NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})

# Without a trace: the comma of 1,000; apostrophes; full stops, unless a digit follows (3.5 and .5).
_NOTHING = re.compile(r"(?<=\d),(?=\d)|['’]|\.(?!\d)")
# What parts words. Signs with a meaning of their own stay: 10:30, 50%, $5, R&B, #1.
_SPACE = re.compile(r'[;/\\\[\]{}()"=+_<>@`,?!-]')


def normalise_answer(text: str) -> str:
    """The form in which answers are compared, in the manner of the VQA challenge's evaluation.

        "The T-shirt!" -> "t shirt"      "Don't." -> "dont"      "two, a red one" -> "2 red 1"
        "1,000.5" -> "1000.5"            "p.m." -> "pm"          "None" -> "0"

    Three rules are simpler than the official script's. Apostrophes go, where it restores missing
    ones from a table (equal for "dont" and "don't", and more lenient for "well" and "we'll").
    Punctuation parts words everywhere, where the script joins them if the same sign stands next to
    a space elsewhere in the answer. An answer of nothing but articles keeps them: "A" is a choice.
    """
    words = _SPACE.sub(" ", _NOTHING.sub("", text.lower())).split()
    content = [_NUMBERS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(content or words)


def answer_accuracy(
    predictions: Sequence[str], accepted: Sequence[Sequence[str]]
) -> Float[np.ndarray, " n"]:
    """1.0 where the prediction is one of the accepted answers after `normalise_answer`, else 0.0.

    An empty prediction is wrong, and so is a whole sentence that contains the answer: ask for a
    word. For one reference per question (GQA, the bundled scenes) this is exact match.

    Raises:
        DataError: a question without an accepted answer, or with an empty one.
        ValueError: two different lengths.
    """
    predicted, expected = _normalised(predictions, accepted)
    pairs = zip(predicted, expected, strict=True)
    return np.array([float(answer in answers) for answer, answers in pairs], dtype=np.float64)


def consensus_accuracy(
    predictions: Sequence[str], human: Sequence[Sequence[str]]
) -> Float[np.ndarray, " n"]:
    """The VQA challenge's accuracy against the answers of several people (usually ten), in [0, 1].

    An answer that at least three people gave is right. To put the machine on a par with a person,
    min(1, matches / 3) is averaged over all ways to leave one person out:

        of ten people  0    1    2    3    4 or more  gave the answer
        accuracy       0   .3   .6   .9    1

    Raises:
        DataError: a question with fewer than two answers, or with an empty one.
        ValueError: two different lengths.
    """
    predicted, expected = _normalised(predictions, human)
    scores = []
    for i, (answer, answers) in enumerate(zip(predicted, expected, strict=True)):
        people, matches = len(answers), answers.count(answer)
        if people < 2:
            raise DataError(
                f"question {i} has {people} answer; consensus needs those of several people, "
                "answer_accuracy does not"
            )
        without_a_match = matches * min(1.0, (matches - 1) / 3)
        others = (people - matches) * min(1.0, matches / 3)
        scores.append((without_a_match + others) / people)
    return np.array(scores, dtype=np.float64)


def _normalised(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} questions")
    expected = []
    for i, answers in enumerate(references):
        if isinstance(answers, str):  # its letters would be taken for answers
            raise ValueError(f"the answers to question {i} are one string; give a list of strings")
        forms = [normalise_answer(answer) for answer in answers]
        if not forms or "" in forms:
            raise DataError(f"question {i} has no answer, or an empty one; remove it")
        expected.append(forms)
    return [normalise_answer(prediction) for prediction in predictions], expected


# ---------------------------------------------------------------------- calibration

CALIBRATION_BINS = 10
"""Bins of equal width, as in Guo et al. (arXiv 1706.04599), there 15."""


def calibration_columns(
    log_odds: Float[np.ndarray, "n k"], right: Bool[np.ndarray, "n k"]
) -> Float[np.ndarray, "n bins"]:
    """What `calibration_summary` needs of each sample, to be summed over samples.

    Args:
        log_odds: of "yes", for the k statements of each sample.
        right: whether each statement is true.

    Returns:
        P("yes") - truth, summed over the sample's statements whose P("yes") lies in the bin.
    """
    probability = 0.5 * (1 + np.tanh(np.asarray(log_odds, dtype=np.float64) / 2))
    bins = np.minimum((probability * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    columns = np.zeros((len(probability), CALIBRATION_BINS))
    samples = np.broadcast_to(np.arange(len(probability))[:, None], bins.shape)
    np.add.at(columns, (samples, bins), probability - right)
    return columns


def calibration_summary(
    sums: Mapping[str, Float[np.ndarray, " ..."]],
) -> dict[str, Float[np.ndarray, " ..."]]:
    """The expected calibration error (arXiv 1706.04599, eq. 3) of yes/no probabilities.

        sum over bins of |mean P("yes") - share of true statements| x share of statements in the bin

    The published number bins the confidence in the predicted answer; for two answers whose errors
    are symmetric both agree. Here P("yes") itself is binned, so that too many a "yes" shows.

    Args:
        sums: of `calibration` ([..., bins], `calibration_columns`), and of `judged` ([...], the
            number of statements); leading axes are resamples.

    Returns:
        match_ece, [...].
    """
    return {"match_ece": np.asarray(np.abs(sums["calibration"]).sum(axis=-1) / sums["judged"])}
