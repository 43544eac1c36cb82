"""Hallucination metrics: POPE, CHAIR, THRONE, and F1 of named objects.

All four compare the objects that a model mentions with those in the image. POPE asks the model
yes/no questions; CHAIR and the object F1 look for object names in its captions; THRONE lets judges
read its free descriptions and vote. Objects are any hashable names. The functions return columns of
counts, one row per image: scores are quotients of column sums, so they can be computed on any
resample of the images. All scores are fractions in [0, 1]; 0 / 0 is 0. Read CHAIR and precision
together with recall or length: a model that says nothing hallucinates nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cafe.errors import DataError

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Bool, Float, Int

__all__ = [
    "ABSENT",
    "DISQUALIFIED",
    "PRESENT",
    "THRONE_VOTES",
    "chair_columns",
    "judge_says_yes",
    "object_columns",
    "parse_yes_no",
    "pope_columns",
    "throne_columns",
    "throne_summary",
    "throne_verdicts",
]

PRESENT, ABSENT, DISQUALIFIED = 1, 0, -1
"""THRONE's verdicts about one class in one description."""

THRONE_VOTES = 9
"""Three judges, three phrasings of the question."""

_BETAS = {"f1": 1.0, "f0.5": 0.5}


def parse_yes_no(reply: str) -> bool:
    """The official POPE parser: True (yes) unless the first sentence has `No`, `no` or `not`.

    The text up to the first full stop, without commas, is split at spaces. So an empty or evasive
    reply is a *yes*, "NO" is one too, and so is "no" when a line break follows instead of a space.
    """
    words = reply.split(".", 1)[0].replace(",", "").split(" ")
    return not {"No", "not", "no"}.intersection(words)


def pope_columns(
    images: Int[np.ndarray, " n"],
    predicted: Bool[np.ndarray, " n"] | Sequence[bool],
    labels: Bool[np.ndarray, " n"] | Sequence[bool],
    count: int,
) -> dict[str, Int[np.ndarray, " count"]]:
    """Per image, counts whose sums give POPE's numbers for one setting; "yes" is positive.

        accuracy   right / asked          f1          hits_twice / yes_and_there
        precision  hits / yes             yes_ratio   yes / asked; half of the labels are yes
        recall     hits / there

    Args:
        images: which of the `count` images each of the n questions is about, from 0.
        predicted: whether the answer was yes.
        labels: whether it should have been.
        count: number of images; those without a question have zero counts.

    Raises:
        ValueError: no questions, two lengths, or anything but booleans ("no" would count as true).
    """
    said, true = _flags("predicted", predicted), _flags("labels", labels)
    if said.shape != true.shape or said.size == 0:
        raise ValueError(f"{said.size} answers and {true.size} labels; give each question both")

    def per_image(flags: Bool[np.ndarray, " n"]) -> Int[np.ndarray, " count"]:
        return np.bincount(images[flags], minlength=count)

    hits, yes, there = per_image(said & true), per_image(said), per_image(true)
    return {
        "asked": np.bincount(images, minlength=count),
        "right": per_image(said == true),
        "hits": hits,
        "yes": yes,
        "there": there,
        "hits_twice": 2 * hits,
        "yes_and_there": yes + there,
    }


def chair_columns(
    mentioned: Sequence[Collection[Hashable]],
    present: Sequence[Collection[Hashable]],
    lengths_words: Sequence[int],
) -> dict[str, Int[np.ndarray, " n"]]:
    """Per caption, counts whose sums give CHAIR (Rohrbach et al. 2018).

        chair_i         invented / mentions: mentions of absent objects; repetitions count
        chair_s         any_invented / captions
        recall          found / there: distinct objects named and present / present
        mean_mentions   mentions / captions; and mean_length_words is words / captions

    Args:
        mentioned: for each caption its object mentions in the vocabulary of `present`, with
            repetitions (a set would count each object once).
        present: for each caption the objects that are in its image.
        lengths_words: number of words of each caption.

    Raises:
        ValueError: no captions, different lengths, or a plain string where objects belong.
    """
    _check_collections(mentioned, present)
    if len(lengths_words) != len(mentioned):
        raise ValueError(f"{len(lengths_words)} lengths for {len(mentioned)} captions")
    pairs = [(names, set(there)) for names, there in zip(mentioned, present, strict=True)]
    invented = np.array([sum(name not in there for name in names) for names, there in pairs])
    return {
        "mentions": np.array([len(names) for names, _ in pairs]),
        "invented": invented,
        "any_invented": (invented > 0).astype(np.int64),
        "found": np.array([len(there.intersection(names)) for names, there in pairs]),
        "there": np.array([len(there) for _, there in pairs]),
        "words": np.array(lengths_words),
    }


def object_columns(
    mentioned: Sequence[Collection[Hashable]], present: Sequence[Collection[Hashable]]
) -> dict[str, Int[np.ndarray, " n"]]:
    """Per image, counts of distinct objects; their sums give precision, recall and F1.

        precision  objects_right / objects_named
        recall     objects_right / objects_shown
        f1         objects_right_twice / objects_named_and_shown

    Raises:
        ValueError: no images, two lengths, or a plain string where objects belong.
    """
    _check_collections(mentioned, present)
    pairs = [(set(names), set(there)) for names, there in zip(mentioned, present, strict=True)]
    right = np.array([len(names & there) for names, there in pairs])
    named = np.array([len(names) for names, _ in pairs])
    shown = np.array([len(there) for _, there in pairs])
    return {
        "objects_right": right,
        "objects_right_twice": 2 * right,
        "objects_named": named,
        "objects_shown": shown,
        "objects_named_and_shown": named + shown,
    }


def judge_says_yes(reply: str) -> bool:
    """THRONE's reading of a judge: "yes" alone, in any case, is a vote; all else is none."""
    return reply.lower().strip() == "yes"


def throne_verdicts(
    yes_votes: Int[np.ndarray, "n c"], *, votes: int = THRONE_VOTES
) -> Int[np.ndarray, "n c"]:
    """Per description and class: PRESENT if all voted yes, ABSENT if none, else DISQUALIFIED.

    Raises:
        DataError: a count outside 0 .. votes.
        ValueError: fewer than one vote.
    """
    if votes < 1:
        raise ValueError(f"votes is {votes}; there must be at least one judge")
    if yes_votes.size and (yes_votes.min() < 0 or yes_votes.max() > votes):
        raise DataError(
            f"yes votes range over {yes_votes.min()} .. {yes_votes.max()}; expected 0 .. {votes}"
        )
    unanimous = np.where(yes_votes == votes, PRESENT, ABSENT)
    return np.where((yes_votes > 0) & (yes_votes < votes), DISQUALIFIED, unanimous)


def throne_columns(
    yes_votes: Int[np.ndarray, "n c"],
    present: Bool[np.ndarray, "n c"],
    *,
    votes: int = THRONE_VOTES,
) -> dict[str, Float[np.ndarray, "n ..."]]:
    """Per image, what `throne_summary` needs the sums of, over n images and c classes.

    A class on which the votes differ is taken out of prediction and ground truth of that image.
    `hits`, `said` and `true` are [n, c], all others [n].

    Args:
        yes_votes: how many of the votes said that the description has the class (`judge_says_yes`).
        present: the ground truth.
        votes: votes per cell.

    Raises:
        DataError, ValueError: as in `throne_verdicts`; no cells, two shapes, or truth not boolean.
    """
    truth = _flags("present", present)
    if yes_votes.shape != truth.shape or truth.ndim != 2 or truth.size == 0:
        raise ValueError(f"votes {yes_votes.shape} and truth {truth.shape} must both be [n, c]")
    verdicts = throne_verdicts(yes_votes, votes=votes)
    said = verdicts == PRESENT
    true = truth & (verdicts != DISQUALIFIED)
    hits = said & true
    counts = [cells.sum(axis=1) for cells in (hits, said, true)]
    either_empty = (counts[1] == 0) | (counts[2] == 0)
    precision, recall = (np.where(either_empty, 0.0, v) for v in _precision_recall(*counts))
    # Result files have a column "pictures", and comparisons read files of earlier versions: the
    # stored name stays.
    columns = {
        "pictures": np.ones(len(truth)),
        "cells": np.full(len(truth), float(truth.shape[1])),
        "disqualified": (verdicts == DISQUALIFIED).sum(axis=1).astype(np.float64),
        "precision": precision,
        "recall": recall,
    }
    for name, beta in _BETAS.items():
        score = _f(precision, recall, beta)
        columns[name] = np.nan_to_num(score)
        columns[f"{name}_exists"] = (~np.isnan(score)).astype(np.float64)
    cells = {"hits": hits, "said": said, "true": true}
    return columns | {name: value.astype(np.float64) for name, value in cells.items()}


def throne_summary(
    sums: Mapping[str, Float[np.ndarray, " ..."]],
) -> dict[str, Float[np.ndarray, " ..."]]:
    """THRONE's scores (arXiv 2405.05256) from sums of `throne_columns` over images.

    Sums are [...], those of `hits`, `said` and `true` [..., c]; so are the scores, [...]. Leading
    axes are resamples.

        overall_*     precision and recall per image, 0 where nothing is said or nothing is there,
                      averaged over images
        classwise_*   precision and recall per class over all images, averaged over the classes
                      for which they exist

    Two ways to F, because published tables have both and differ by a point or more (F0.5 weighs
    precision double):

        *_f1, *_f0.5             of the averaged precision and recall, as in THRONE's paper
        *_mean_f1, *_mean_f0.5   F per image or class, averaged where it exists, as in THRONE's
                                 released code: images with P = R = 0 drop out, which raises it

    and `disqualified`, the share of (image, class) cells taken out. The paper's headline number
    is classwise_f0.5.
    """
    overall = (
        _quotient(sums["precision"], sums["pictures"]),
        _quotient(sums["recall"], sums["pictures"]),
    )
    per_class = _precision_recall(sums["hits"], sums["said"], sums["true"])
    scores = {"overall_precision": overall[0], "overall_recall": overall[1]}
    classwise = _mean_of_numbers(per_class[0]), _mean_of_numbers(per_class[1])
    for name, beta in _BETAS.items():
        scores[f"overall_{name}"] = np.nan_to_num(_f(*overall, beta))
        scores[f"overall_mean_{name}"] = _quotient(sums[name], sums[f"{name}_exists"])
    scores |= {"classwise_precision": classwise[0], "classwise_recall": classwise[1]}
    for name, beta in _BETAS.items():
        scores[f"classwise_{name}"] = np.nan_to_num(_f(*classwise, beta))
        scores[f"classwise_mean_{name}"] = _mean_of_numbers(_f(*per_class, beta))
    return scores | {"disqualified": _quotient(sums["disqualified"], sums["cells"])}


def _precision_recall(
    hits: np.ndarray, said: np.ndarray, true: np.ndarray
) -> tuple[Float[np.ndarray, " ..."], Float[np.ndarray, " ..."]]:
    """NaN where nothing was said, or nothing is there. All shapes are alike."""
    with np.errstate(invalid="ignore"):
        return hits / said, hits / true


def _f(
    precision: Float[np.ndarray, " ..."], recall: Float[np.ndarray, " ..."], beta: float
) -> Float[np.ndarray, " ..."]:
    """(1 + β²) P R / (β² P + R); NaN where P or R is, or where both are 0."""
    with np.errstate(invalid="ignore"):
        return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def _quotient(
    part: Float[np.ndarray, " ..."], whole: Float[np.ndarray, " ..."]
) -> Float[np.ndarray, " ..."]:
    """The quotient; 0 / 0 is 0."""
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=np.asarray(whole) != 0)


def _mean_of_numbers(values: Float[np.ndarray, "*_ c"]) -> Float[np.ndarray, " ..."]:
    """The mean along the last axis, ignoring NaNs; 0 if all are NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nan_to_num(np.nanmean(values, axis=-1))


def _flags(name: str, values: np.ndarray | Sequence[bool]) -> Bool[np.ndarray, ...]:
    array = np.asarray(values)
    if array.dtype != np.bool_:
        raise ValueError(f"{name} is {array.dtype}; it must be booleans")
    return array


def _check_collections(
    mentioned: Sequence[Collection[Hashable]], present: Sequence[Collection[Hashable]]
) -> None:
    if len(mentioned) != len(present) or not mentioned:
        raise ValueError(f"{len(mentioned)} captions for {len(present)} images; give each one")
    for i, objects in enumerate((*mentioned, *present)):
        if isinstance(objects, str):  # its letters would be taken for objects
            raise ValueError(f"entry {i % len(present)} is the string {objects!r}; give a list")
