"""Ranks, recall, hit@1 and NDCG: tables checked by hand, the definition written out, properties."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.errors import DataError
from cafe.metrics import (
    TIE_TOLERANCE,
    candidate_scores,
    first_relevant_ranks,
    hit_at_1,
    ndcg_at_k,
    rank_relevances,
    two_way_ranks,
)
from helpers.metric_reference import recall_at_k, recalls

Table = list[list[float]]

# Four images, two captions each: image i owns captions 2i and 2i + 1.
CAPTIONS = [[0, 1], [2, 3], [4, 5], [6, 7]]
SCORES: Table = [
    #  own               own               own               own
    [0.9, 0.1, 0.3, 0.2, 0.3, 0.2, 0.1, 0.0],  # 0.9 beats all                       -> rank 1
    [0.5, 0.6, 0.4, 0.4, 0.1, 0.1, 0.2, 0.3],  # 0.4 is below 0.6, 0.5               -> rank 3
    [0.2, 0.7, 0.1, 0.3, 0.7, 0.2, 0.1, 0.1],  # 0.7 ties with caption 1             -> rank 2
    [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],  # 0.2 is below six foreign captions   -> rank 7
]
IMAGE_RANKS = [1, 3, 2, 7]
# Down each column: the caption's own image against the other three images.
CAPTION_RANKS = [
    1,  # 0.9 over 0.5, 0.2, 0.8
    4,  # 0.1 under 0.6, 0.7, 0.7
    2,  # 0.4 under 0.6
    2,  # 0.4 under 0.5
    1,  # 0.7 over 0.3, 0.1, 0.4
    3,  # 0.2 ties with image 0 and is under 0.3 of image 3
    2,  # 0.2 ties with image 1
    3,  # 0.1 is under 0.3 of image 1 and ties with image 2
]


def embeddings_of(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Queries and candidates whose dot products are exactly the table."""
    scores = np.array(table)
    return scores, np.eye(scores.shape[1])


def slow_ranks(
    queries: np.ndarray, candidates: np.ndarray, relevant: list[list[int]]
) -> tuple[list[int], list[int]]:
    """The definition, one candidate at a time, both ways."""

    def rank(one: np.ndarray, others: np.ndarray, own: list[int]) -> int:
        scores = [math.fsum(one.astype(float) * other.astype(float)) for other in others]
        best = max((scores[j] for j in own), default=-math.inf)
        return 1 + sum(s >= best - TIE_TOLERANCE for j, s in enumerate(scores) if j not in own)

    owners = [[i for i, own in enumerate(relevant) if j in own] for j in range(len(candidates))]
    return (
        [rank(query, candidates, own) for query, own in zip(queries, relevant, strict=True)],
        [rank(candidate, queries, own) for candidate, own in zip(candidates, owners, strict=True)],
    )


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@st.composite
def small_worlds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Small integers as embeddings: exact scores, many of them tied; every candidate owned."""
    n, extra, d = draw(st.integers(1, 7)), draw(st.integers(0, 12)), draw(st.integers(1, 3))
    owner = [*range(n), *draw(st.lists(st.integers(0, n - 1), min_size=extra, max_size=extra))]
    m = len(owner)
    relevant = [[j for j in range(m) if owner[j] == i] for i in range(n)]
    also = draw(st.integers(0, m - 1))  # one candidate may belong to two queries
    relevant[0] = sorted({*relevant[0], also})
    cells = st.lists(st.integers(-2, 2), min_size=(n + m) * d, max_size=(n + m) * d)
    rows = np.array(draw(cells), dtype=np.float32).reshape(n + m, d)
    return rows[:n], rows[n:], relevant


# --- the table --------------------------------------------------------------------------------


def test_ranks_of_the_table() -> None:
    images, captions = embeddings_of(SCORES)
    assert first_relevant_ranks(images, captions, CAPTIONS).tolist() == IMAGE_RANKS
    forward, backward = two_way_ranks(images, captions, CAPTIONS)
    assert (forward.tolist(), backward.tolist()) == (IMAGE_RANKS, CAPTION_RANKS)


def test_recalls_of_the_table() -> None:
    assert recall_at_k(*embeddings_of(SCORES), CAPTIONS, ks=(1, 2, 5)) == {
        "query_to_target_recall@1": 1 / 4,
        "query_to_target_recall@2": 2 / 4,
        "query_to_target_recall@5": 3 / 4,
        "target_to_query_recall@1": 2 / 8,
        "target_to_query_recall@2": 5 / 8,
        "target_to_query_recall@5": 8 / 8,
    }


def test_recalls_of_ranks() -> None:
    expected = {"recall@1": 0.25, "recall@5": 0.75, "recall@10": 1.0}
    assert recalls(np.array([1, 5, 2, 7])) == expected


def test_any_caption_is_enough_and_the_other_captions_do_not_compete() -> None:
    images, captions = embeddings_of([[0.1, 0.9, 0.5], [0.9, 0.9, 0.2]])
    assert first_relevant_ranks(images, captions, [[0, 1], [2]]).tolist() == [1, 3]
    tied_siblings = embeddings_of([[0.9, 0.9, 0.9, 0.1]])
    assert first_relevant_ranks(*tied_siblings, [[0, 1, 2]]).tolist() == [1]


def test_distractors_compete_in_one_direction_and_are_refused_in_two() -> None:
    world = embeddings_of([[0.5, 0.6, 0.1]])
    assert first_relevant_ranks(*world, [[0]]).tolist() == [2]
    with pytest.raises(DataError, match="target 1 is relevant to no query"):
        two_way_ranks(*world, [[0]])


# --- chance, ties, order, blocks --------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 64, 768, 3584])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_constant_embeddings_come_last_whatever_rounding_does(width: int, dtype: str) -> None:
    images = np.full((7, width), width**-0.5, dtype=dtype)
    captions = np.full((35, width), width**-0.5, dtype=dtype)
    relevant = [list(range(5 * i, 5 * i + 5)) for i in range(7)]
    forward, backward = two_way_ranks(images, captions, relevant, block=4)
    assert set(forward.tolist()) == {35 - 5 + 1}
    assert set(backward.tolist()) == {7}
    assert set(recall_at_k(images, captions, relevant, ks=(1, 5)).values()) == {0.0}


def test_without_the_tie_rule_constant_embeddings_would_be_perfect() -> None:
    scores = np.ones((7, 7))
    strictly_better = (scores > scores.diagonal()[:, None]).sum(axis=1)
    assert (1 + strictly_better == 1).all()
    assert (scores.argmax(axis=1) == 0).all()


def test_equal_embeddings_tie_although_float32_would_tell_them_apart() -> None:
    width = 3584
    same = np.full((5, width), width**-0.5, dtype=np.float32)
    terms = same[0] * same[0]
    # The premise: the order of summation, hence the place in the matrix, decides the last digits.
    assert abs(np.cumsum(terms)[-1] - terms.sum()) > 1e-6
    assert first_relevant_ranks(same[:3], same[:5], [[0], [1], [2]]).tolist() == [5, 5, 5]


@settings(max_examples=60, deadline=None)
@given(world=small_worlds(), block=st.integers(1, 9))
def test_blocks_equal_the_definition(
    world: tuple[np.ndarray, np.ndarray, list[list[int]]], block: int
) -> None:
    forward, backward = two_way_ranks(*world, block=block)
    assert (forward.tolist(), backward.tolist()) == slow_ranks(*world)
    assert first_relevant_ranks(*world, block=block).tolist() == forward.tolist()


@settings(max_examples=60, deadline=None)
@given(world=small_worlds(), seed=st.integers(0, 2**32 - 1))
def test_the_order_of_queries_and_candidates_changes_nothing(
    world: tuple[np.ndarray, np.ndarray, list[list[int]]], seed: int
) -> None:
    queries, candidates, relevant = world
    rng = np.random.default_rng(seed)
    row, column = rng.permutation(len(queries)), rng.permutation(len(candidates))
    where = np.argsort(column)
    moved = [rng.permutation(where[relevant[i]]) for i in row]
    forward, backward = two_way_ranks(*world)
    again, back_again = two_way_ranks(queries[row], candidates[column], moved)
    assert (again == forward[row]).all()
    assert (back_again == backward[column]).all()


@settings(max_examples=40, deadline=None)
@given(world=small_worlds())
def test_another_candidate_never_improves_a_rank(
    world: tuple[np.ndarray, np.ndarray, list[list[int]]],
) -> None:
    queries, candidates, relevant = world
    fewer = first_relevant_ranks(queries, candidates, relevant)
    more = first_relevant_ranks(queries, np.concatenate([candidates, candidates[:1]]), relevant)
    assert (more >= fewer).all()
    assert fewer.min() >= 1
    assert fewer.max() <= len(candidates)


def test_random_embeddings_score_at_chance() -> None:
    rng = np.random.default_rng(0)
    queries, candidates = (unit(rng.standard_normal((k, 8))) for k in (400, 2000))
    relevant = np.arange(2000).reshape(400, 5).tolist()
    scores = recall_at_k(queries, candidates, relevant, ks=(10, 100))
    # The best of 5 among 2,000 places is within the first 100 in 1 - 0.95**5 = 22.6 % of cases.
    assert scores["query_to_target_recall@100"] == pytest.approx(1 - 0.95**5, abs=0.06)
    assert scores["target_to_query_recall@10"] == pytest.approx(10 / 400, abs=0.01)


def test_memory_is_that_of_a_block_not_of_all_scores() -> None:
    rng = np.random.default_rng(0)
    queries, candidates = (rng.standard_normal((k, 16)).astype(np.float32) for k in (600, 3000))
    relevant = np.arange(3000).reshape(600, 5).tolist()
    two_way_ranks(queries[:2], candidates[:10], relevant[:2])  # whatever is allocated only once
    peaks = []
    for block in (128, 3000):
        tracemalloc.start()
        two_way_ranks(queries, candidates, relevant, block=block)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    all_scores_bytes = 8 * 600 * 3000
    assert peaks[0] < all_scores_bytes / 8 < all_scores_bytes < peaks[1]


# --- hit@1 ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "hit"),
    [
        ([0.9, 0.8, 0.1], True),
        ([0.8, 0.9, 0.1], False),
        ([0.9, 0.9, 0.1], False),  # argmax would say 0
        ([0.9, 0.9 - 1e-12, 0.1], False),  # equal up to rounding
        ([0.9, 0.9 - 1e-6, 0.1], True),
        ([0.3], True),  # nothing to confuse it with
        ([math.nan, 0.1], False),
        ([0.9, math.nan], False),
    ],
)
def test_hit_at_1_by_hand(scores: list[float], hit: bool) -> None:
    assert hit_at_1([np.array(scores)]).tolist() == [hit]


def test_lists_of_different_lengths_and_shared_candidates() -> None:
    queries, candidates = embeddings_of([[0.9, 0.5, 0.1], [0.2, 0.3, 0.4]])
    scores = candidate_scores(queries, candidates, [[0, 1, 2], [1, 2]])
    assert [row.tolist() for row in scores] == [[0.9, 0.5, 0.1], [0.3, 0.4]]
    assert hit_at_1(scores).tolist() == [True, False]


@pytest.mark.parametrize("width", [1, 768, 3584])
def test_constant_embeddings_never_hit(width: int) -> None:
    same = np.full((40, width), width**-0.5, dtype=np.float32)
    lists = [np.roll(np.arange(40), -i) for i in range(3)]
    assert not hit_at_1(candidate_scores(same[:3], same, lists)).any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_the_order_of_the_wrong_candidates_changes_no_hit(scores: list[int], random) -> None:
    wrong = random.sample(scores[1:], len(scores) - 1)
    before, after = (np.array(row, dtype=float) for row in (scores, [scores[0], *wrong]))
    assert hit_at_1([before]).tolist() == hit_at_1([after]).tolist()
    assert hit_at_1([before])[0] == all(scores[0] > s for s in wrong)


# --- NDCG -------------------------------------------------------------------------------------


def test_ndcg_by_hand() -> None:
    ranked = np.array([3.0, 2.0, 0.0, 1.0])
    # discounts log2 2, 3, 4, 5
    found = 3 + 2 / math.log2(3) + 0 / 2 + 1 / math.log2(5)
    best = 3 + 2 / math.log2(3) + 1 / 2
    assert ndcg_at_k(ranked, 5) == pytest.approx(found / best)
    assert ndcg_at_k(ranked, 3) == pytest.approx((3 + 2 / math.log2(3)) / best)
    assert ndcg_at_k(ranked[::-1], 1) == pytest.approx(1 / 3)
    exponential = (7 + 3 / math.log2(3) + 1 / math.log2(5)) / (7 + 3 / math.log2(3) + 1 / 2)
    assert ndcg_at_k(ranked, 5) != pytest.approx(exponential, rel=1e-4)  # the gain is linear


@pytest.mark.parametrize("place", [1, 2, 3, 5, 6])
def test_one_relevant_page_gives_one_over_the_log_of_its_place(place: int) -> None:
    ranked = np.zeros(8)
    ranked[place - 1] = 1.0
    expected = 1 / math.log2(place + 1) if place <= 5 else 0.0
    assert ndcg_at_k(ranked, 5) == pytest.approx(expected)


def test_relevant_pages_beyond_a_cut_list_still_count_in_the_best_order() -> None:
    cut, everything = np.array([0.0, 1.0]), np.array([1.0, 1.0, 1.0])
    best = 1 + 1 / math.log2(3) + 1 / 2
    assert ndcg_at_k(cut, 5, judged=everything) == pytest.approx(1 / math.log2(3) / best)
    assert ndcg_at_k(cut, 5) == pytest.approx(1 / math.log2(3))


def test_among_ties_the_least_relevant_is_first() -> None:
    scores = np.array([0.2, 0.9, 0.9 - 1e-12, 0.9, 0.1, math.nan, math.nan])
    relevances = np.array([1.0, 2.0, 1.0, 0.0, 3.0, 5.0, 4.0])
    assert rank_relevances(scores, relevances).tolist() == [0, 1, 2, 1, 3, 4, 5]


def test_constant_scores_give_the_worst_order() -> None:
    relevances = np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert ndcg_at_k(rank_relevances(np.full(6, 0.3), relevances), 5) == 0.0


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=9),
    k=st.integers(1, 10),
    random=st.randoms(use_true_random=False),
)
def test_ndcg_knows_no_order_of_candidates_and_stays_within_bounds(
    pairs: list[tuple[int, int]], k: int, random
) -> None:
    pairs.append((0, 1))  # something is relevant
    shuffled = random.sample(pairs, len(pairs))
    values = []
    for order in (pairs, shuffled):
        scores, relevances = np.array(order, dtype=float).T
        values.append(ndcg_at_k(rank_relevances(scores, relevances), k))
    assert values[0] == values[1]
    assert 0 <= values[0] <= 1
    assert ndcg_at_k(np.sort([float(r) for _, r in pairs])[::-1], k) == pytest.approx(1)


# --- bad input --------------------------------------------------------------------------------

TWO, THREE = np.eye(2, 3), np.eye(3)


@pytest.mark.parametrize(
    ("queries", "candidates", "relevant", "block", "error", "words"),
    [
        (TWO, THREE, [[0], []], 8, DataError, "query 1 has no candidate"),
        (TWO, THREE, [[0], [3]], 8, DataError, "query 1 names candidate 3; there are only 3"),
        (TWO, THREE, [[0], [-1]], 8, DataError, "names candidate -1"),
        (TWO, THREE, [[0], [2, 1, 2]], 8, DataError, "query 1 names candidate 2 twice"),
        (TWO, THREE * [[1], [math.nan], [1]], [[0], [1]], 8, DataError, "candidate 1 has NaN"),
        (TWO + math.inf, THREE, [[0], [1]], 8, DataError, "query 0 has NaN or infinity"),
        (TWO, THREE, [[0]], 8, ValueError, "2 queries, 1 lists"),
        (TWO, np.eye(3, 4), [[0], [1]], 8, ValueError, r"must be \[n, d\] and \[m, d\]"),
        (TWO, THREE, [[0.0], [1.0]], 8, ValueError, "must be integers"),
        (TWO, THREE, [[0], [1]], 0, ValueError, "block is 0"),
        (TWO[:0], THREE, [], 8, ValueError, "0 queries"),
    ],
)
def test_bad_retrieval_input_is_one_clear_error(
    queries, candidates, relevant, block, error, words
) -> None:
    with pytest.raises(error, match=words):
        first_relevant_ranks(queries, candidates, relevant, block=block)


def test_other_bad_input_is_one_clear_error() -> None:
    with pytest.raises(DataError, match="query 1 has no candidates"):
        hit_at_1([np.ones(2), np.ones(0)])
    with pytest.raises(DataError, match="NDCG is undefined"):
        ndcg_at_k(np.zeros(4), 5)
    with pytest.raises(DataError, match="negative or NaN"):
        ndcg_at_k(np.array([1.0, -1.0]), 5)
    with pytest.raises(ValueError, match="k is 0"):
        ndcg_at_k(np.ones(1), 0)
    with pytest.raises(ValueError, match="must be alike"):
        rank_relevances(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="1-based"):
        recalls(np.array([0, 1]))
    with pytest.raises(ValueError, match="each k"):
        recalls(np.array([1]), ks=(0,))
