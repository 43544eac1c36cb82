"""The metrics as their papers define them, one number at a time: what fast columns must equal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence

import numpy as np

from cafe.metrics import Interval, throne_columns, throne_summary, two_way_ranks
from cafe.types import Scores

Objects = Sequence[Collection[Hashable]]


def pope_scores(predicted: Sequence[bool], labels: Sequence[bool]) -> Scores:
    """POPE's numbers for one setting; "yes" (True) is the positive class.

    Keys: accuracy, precision, recall, f1, yes_ratio (the share of questions answered yes; half of
    the questions have that answer).
    """
    pairs = list(zip(predicted, labels, strict=True))
    hits = sum(bool(said and true) for said, true in pairs)
    return {
        "accuracy": sum(said == true for said, true in pairs) / len(pairs),
        **_precision_recall_f1(hits, sum(map(bool, predicted)), sum(map(bool, labels))),
        "yes_ratio": sum(map(bool, predicted)) / len(pairs),
    }


def chair_scores(
    mentioned: Objects, present: Objects, *, lengths_words: Sequence[int] | None = None
) -> Scores:
    """CHAIR (Rohrbach et al. 2018) over captions: how much of what they name is not there.

    chair_i         mentions of absent objects / all mentions; repetitions count
    chair_s         captions with at least one absent object / captions
    recall          different objects named and present / objects present, summed over captions
    mean_mentions   mentions per caption, and with `lengths_words` mean_length_words
    """
    mentions = sum(len(names) for names in mentioned)
    invented = [
        sum(name not in there for name in names)
        for names, there in zip(mentioned, map(set, present), strict=True)
    ]
    found, _, to_find = _object_counts(mentioned, present)
    scores = {
        "chair_i": _fraction(sum(invented), mentions),
        "chair_s": _fraction(sum(count > 0 for count in invented), len(mentioned)),
        "recall": _fraction(found, to_find),
        "mean_mentions": mentions / len(mentioned),
    }
    if lengths_words is not None:
        scores["mean_length_words"] = sum(lengths_words) / len(mentioned)
    return scores


def object_f1(mentioned: Objects, present: Objects) -> Scores:
    """Precision, recall and F1 of the different objects named, counts summed over images."""
    return _precision_recall_f1(*_object_counts(mentioned, present))


def throne_scores(yes_votes: np.ndarray, present: np.ndarray, *, votes: int = 9) -> Scores:
    """THRONE over images and classes: the summary of the sums of its columns."""
    columns = throne_columns(yes_votes, present, votes=votes)
    sums = {name: column.sum(axis=0)[None] for name, column in columns.items()}
    return {name: float(value[0]) for name, value in throne_summary(sums).items()}


def recall_at_k(
    query: np.ndarray,
    target: np.ndarray,
    relevant: Sequence[Sequence[int] | np.ndarray],
    ks: Sequence[int] = (1, 5, 10),
    *,
    block: int = 1024,
) -> Scores:
    """Recall both ways, as CLIP reports it for images (queries) with several captions (targets).

    A hit is *any* relevant item among the first k: an image with five captions needs one of them.
    Keys: `query_to_target_recall@k` and `target_to_query_recall@k`, fractions in [0, 1].
    """
    forward, backward = two_way_ranks(query, target, relevant, block=block)
    return {
        f"{direction}_{name}": value
        for direction, ranks in (("query_to_target", forward), ("target_to_query", backward))
        for name, value in recalls(ranks, ks).items()
    }


def recalls(ranks: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> Scores:
    """Share of ranks (1-based) that are at most k, under the key `recall@k` for each k.

    Raises:
        ValueError: no ranks, a rank or a k below 1.
    """
    if ranks.size == 0 or ranks.min() < 1:
        raise ValueError("ranks must be 1-based and at least one; see first_relevant_ranks")
    if any(k < 1 for k in ks):
        raise ValueError(f"ks is {tuple(ks)}; each k must be at least 1")
    return {f"recall@{k}": float((ranks <= k).mean()) for k in ks}


def bootstrap_scores(
    score: Callable[[np.ndarray], Scores],
    count: int,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of any metric, which `score` computes anew on the indices of every resample."""
    estimate = score(np.arange(count))
    draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
    rows = [score(draw) for draw in draws]
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    intervals = {}
    for name, value in estimate.items():
        low, high = np.quantile([row[name] for row in rows], tails)
        intervals[name] = Interval(value, float(low), float(high))
    return intervals


def _object_counts(mentioned: Objects, present: Objects) -> tuple[int, int, int]:
    """Different objects named and present, named, present; summed over images."""
    pairs = [(set(names), set(there)) for names, there in zip(mentioned, present, strict=True)]
    return (
        sum(len(names & there) for names, there in pairs),
        sum(len(names) for names, _ in pairs),
        sum(len(there) for _, there in pairs),
    )


def _precision_recall_f1(hits: int, said: int, true: int) -> Scores:
    return {
        "precision": _fraction(hits, said),
        "recall": _fraction(hits, true),
        "f1": _fraction(2 * hits, said + true),
    }


def _fraction(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
