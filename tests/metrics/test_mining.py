"""Hard negatives: tables that a person can check, and a dense twin that sorts everything."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cafe.metrics.mining import HardNegatives, hard_negatives


def from_scores(scores: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Queries and targets whose products are these scores (not unit, which nothing needs here)."""
    table = np.array(scores, dtype=np.float32)
    return np.eye(len(table), dtype=np.float32), table.T.copy()


#          own   0.96  0.94  0.90  0.80  0.50
ROW = [1.0, 0.96, 0.94, 0.90, 0.80, 0.50]


def mined(**options: Any) -> list[int]:
    queries, targets = from_scores([ROW])
    options = {"window": (0, 5), "count": 5, **options}
    return [int(i) for i in hard_negatives(queries, targets, [[0]], **options).indices[0]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"window": (1, 4), "count": 3}, [2, 3, 4]),
        ({"window": (1, 4), "count": 2}, [2, 3]),
        ({"margin": 0.05}, [2, 3, 4, 5, -1]),
        ({"margin": 0.15, "count": 1}, [4]),
        ({"share": 0.95}, [2, 3, 4, 5, -1]),
        ({"share": 0.85}, [4, 5, -1, -1, -1]),
        ({"margin": 0.05, "share": 0.9}, [3, 4, 5, -1, -1]),
        ({"window": (0, 2), "count": 2, "share": 0.5}, [-1, -1]),
        ({"window": (3, 20), "count": 4}, [4, 5, -1, -1]),
    ],
)
def test_window_then_limit_then_the_hardest(options: dict[str, Any], expected: list[int]) -> None:
    assert mined(**options) == expected


def test_a_share_of_a_negative_score_still_lies_below_it() -> None:
    queries, targets = from_scores([[-0.2, -0.205, -0.22, -0.3]])
    found = hard_negatives(queries, targets, [[0]], window=(0, 3), count=3, share=0.95)
    assert found.indices[0].tolist() == [2, 3, -1]


def test_every_relevant_target_is_spared_and_the_first_sets_the_limit() -> None:
    queries, targets = from_scores([[0.5, 0.99, 0.9, 0.4, 0.3]])
    found = hard_negatives(queries, targets, [[0, 1]], window=(0, 3), count=3)
    assert found.indices[0].tolist() == [2, 3, 4]
    limited = hard_negatives(queries, targets, [[0, 1]], window=(0, 3), count=3, margin=0.0)
    assert limited.indices[0].tolist() == [3, 4, -1]
    assert limited.removed == 1
    assert limited.own_scores[0] == pytest.approx(0.5)


def test_scores_and_counts_are_returned() -> None:
    queries, targets = from_scores([ROW, [0.96, 1.0, 0.2, 0.1, 0.1, 0.1]])
    found = hard_negatives(queries, targets, [[0], [1]], window=(0, 2), count=2, margin=0.05)
    assert found.indices.tolist() == [[2, -1], [2, -1]]
    assert found.scores[0, 0] == pytest.approx(0.94)
    assert math.isnan(found.scores[0, 1])
    assert found.counts.tolist() == [1, 1]
    assert found.removed == 2


def test_of_equal_scores_the_lower_index_comes_first_whatever_the_block() -> None:
    queries, targets = from_scores([[1.0, *([0.5] * 40)]])
    for block in (1, 3, 7, 1000):
        found = hard_negatives(queries, targets, [[0]], window=(2, 6), count=4, block=block)
        assert found.indices[0].tolist() == [3, 4, 5, 6]


def dense(
    queries: np.ndarray,
    targets: np.ndarray,
    relevant: list[list[int]],
    window: tuple[int, int],
    count: int,
    margin: float | None,
    share: float | None,
) -> list[list[int]]:
    """The slow twin: the whole row, sorted."""
    result = []
    for query, own in zip(queries, relevant, strict=True):
        scores = [float(query @ target) for target in targets]
        limit = math.inf
        if margin is not None:
            limit = min(limit, scores[own[0]] - margin)
        if share is not None:
            limit = min(limit, scores[own[0]] - (1 - share) * abs(scores[own[0]]))
        order = sorted(set(range(len(targets))) - set(own), key=lambda i: -scores[i])
        kept = [i for i in order[window[0] : window[1]] if scores[i] <= limit][:count]
        result.append(kept + [-1] * (count - len(kept)))
    return result


@pytest.mark.parametrize("block", [1, 5, 16, 200])
@pytest.mark.parametrize(("margin", "share"), [(None, None), (0.1, None), (None, 0.8), (0.2, 0.9)])
def test_blocks_agree_with_the_dense_twin(
    block: int, margin: float | None, share: float | None
) -> None:
    rng = np.random.default_rng(4)
    base = rng.normal(size=(90, 6))
    targets = base / np.linalg.norm(base, axis=1, keepdims=True)
    near = base[:37] + 0.5 * rng.normal(size=(37, 6))
    queries = near / np.linalg.norm(near, axis=1, keepdims=True)
    relevant = [[i, *rng.choice(np.arange(40, 90), size=i % 3, replace=False)] for i in range(37)]
    found = hard_negatives(
        queries, targets, relevant, window=(2, 12), count=4, margin=margin, share=share, block=block
    )
    assert found.indices.tolist() == dense(
        queries, targets, relevant, (2, 12), 4, margin, share
    )  # fmt: skip
    assert (found.counts > 0).any(), "there is something to compare"
    assert not any(set(row) & set(own) for row, own in zip(found.indices, relevant, strict=True))


def test_few_targets_give_few_negatives_and_none_give_none() -> None:
    queries, targets = from_scores([[1.0]])
    found = hard_negatives(queries, targets, [[0]], window=(0, 5), count=5)
    assert isinstance(found, HardNegatives)
    assert found.counts.tolist() == [0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window": (10, 12), "count": 3}, "no room for 3"),
        ({"count": 0}, "no room for 0"),
        ({"margin": -0.1}, "margin is -0.1"),
        ({"share": 1.5}, "share is 1.5"),
        ({"share": 0.0}, "share is 0.0"),
        ({"block": 0}, "block is 0"),
        ({"relevant": [[]]}, "at least one target"),
        ({"relevant": [[9]]}, "outside 0 to 5"),
        ({"targets": np.ones((6, 3))}, r"must be \(n, d\)"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    queries, targets = from_scores([ROW])
    arguments = {"queries": queries, "targets": targets, "relevant": [[0]], **changes}
    with pytest.raises(ValueError, match=says):
        hard_negatives(**arguments)
