"""Search by words, and its order fused with that of the vectors: real LanceDB, and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cafe.errors import DataError
from cafe.index import GENERATED_CAPTION, Index, IndexItem, IndexRow, ModelFacts, Origin, sync
from cafe.index.full_text import CANDIDATES, MAX_WORDS
from cafe.metrics import reciprocal_rank_fusion
from cafe.retrieval.search import Searcher

FACTS = ModelFacts("m", "w", "p", 8)
COLUMNS = {GENERATED_CAPTION: pa.string(), "year": pa.int64()}


@pytest.mark.parametrize(
    ("rankings", "k", "expected"),
    [
        ([], 60, []),
        ([["a", "b"]], 60, [("a", 1 / 61), ("b", 1 / 62)]),
        # By hand: a 1/61 + 1/63, b 1/62 + 1/61, c 1/63, d 1/62.
        (
            [["a", "b", "c"], ["b", "d", "a"]],
            60,
            [("b", 1 / 62 + 1 / 61), ("a", 1 / 61 + 1 / 63), ("d", 1 / 62), ("c", 1 / 63)],
        ),
        # What both have lies before what one has first; equal ones stay as they came.
        ([["a", "c"], ["b", "c"]], 60, [("c", 2 / 62), ("a", 1 / 61), ("b", 1 / 61)]),
        # A small k lets the first rank of one order win.
        ([["a", "c"], ["b", "c"]], 0, [("a", 1.0), ("b", 1.0), ("c", 1.0)]),
        (
            [["a", "x", "c"], ["b", "y", "c"]],
            0,
            [("a", 1), ("b", 1), ("c", 2 / 3), ("x", 1 / 2), ("y", 1 / 2)],
        ),
    ],
)
def test_orders_are_fused_by_their_ranks(
    rankings: list[list[str]], k: int, expected: list[tuple[str, float]]
) -> None:
    found = reciprocal_rank_fusion(rankings, k)
    scores = dict(found)
    for name, score in expected:
        assert scores.pop(name) == pytest.approx(score)
    assert not scores
    best = [name for name, score in found if math.isclose(score, found[0][1])]
    assert [name for name, _ in found[: len(best)]] == best
    if k:
        assert [name for name, _ in found] == [name for name, _ in expected]


def direction(degrees: float) -> np.ndarray:
    vector = np.zeros(8, np.float32)
    vector[:2] = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return vector


TEXTS = {  # nearest to the query's vector first
    "a": ("text", "a blue mug", None),
    "b": ("image", None, "A big cat at the top left, and two running dogs."),
    "c": ("image", "un café à Paris", None),
    "d": ("image", None, None),
    "e": ("text", "the cat's red crown", None),
    "f": ("text", "红色的猫在桌子上", None),
}


@pytest.fixture
def index(tmp_path: Path) -> Index:
    index = Index.create(tmp_path / "i", FACTS, columns=COLUMNS)
    rows = [
        IndexRow(id, kind, None, text, extra={GENERATED_CAPTION: said, "year": 2000 + number})  # type: ignore[arg-type]
        for number, (id, (kind, text, said)) in enumerate(TEXTS.items())
    ]
    index.add(rows, np.stack([direction(10.0 * i) for i in range(len(rows))]))
    index.optimize()
    return index


def found(index: Index, words: str, **options: Any) -> list[str]:
    return [hit.id for hit in index.search(direction(0), words=words, **options)]


def test_words_move_rows_of_every_text_column_before_those_without_them(index: Index) -> None:
    assert found(index, "zebra") == list("abcdef"), "no text has it: the vectors' order"
    # e is 5th by vector and 1st or 2nd by words; b is 2nd and 2nd or 1st: both before a.
    assert set(found(index, "cat", top=2)) == {"b", "e"}
    assert found(index, "CAFE") == list("cabdef"), "neither case nor accents"
    assert found(index, "dog runs") == list("bacdef"), "stems"
    assert found(index, "猫") == list("fabcde")[:1] + list("abcde"), "no spaces"
    assert found(index, "cat", where="year < 2003") == list("bac")
    assert found(index, "crown", where="kind = 'image'") == list("bcd")


def test_a_score_is_the_cosine_whichever_order_found_it(index: Index) -> None:
    hits = {hit.id: hit for hit in index.search(direction(0), words="cat")}
    plain = {hit.id: hit for hit in index.search(direction(0))}
    for id, hit in hits.items():
        assert hit.score == pytest.approx(plain[id].score, abs=1e-6)
        assert hit.metadata == plain[id].metadata


def test_the_fused_order_is_that_of_both_orders_by_hand(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(40)]
    texts = [" ".join(rng.choice(vocabulary, rng.integers(2, 9))) for _ in range(400)]
    index = Index.create(tmp_path / "many", FACTS)
    vectors = rng.normal(size=(400, 8)).astype(np.float32)
    index.add([IndexRow(str(i), "text", None, t) for i, t in enumerate(texts)], vectors)
    index.optimize()
    query = rng.normal(size=8).astype(np.float32)
    by_vector = [hit.id for hit in index.search(query, CANDIDATES)]
    raw = index._table.search("w3 w7", query_type="fts", fts_columns=["text"]).limit(400)
    scores = {row["id"]: row["_score"] for row in raw.to_list()}
    assert scores.keys() == {str(i) for i, t in enumerate(texts) if {"w3", "w7"} & {*t.split()}}
    assert 20 < len(scores) < CANDIDATES
    by_words = sorted(scores, key=lambda id: (-scores[id], id))
    expected = reciprocal_rank_fusion([by_vector, by_words])[:20]
    assert [hit.id for hit in index.search(query, 20, words="w3 w7")] == [e[0] for e in expected]
    assert set(by_vector[:20]) != {e[0] for e in expected}, "words changed nothing"
    assert len(index.search(query, 150, words="w3 w7")) == 150


def test_the_full_text_index_follows_its_source(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "i", FACTS)

    def encode(values: list[str]) -> np.ndarray:
        return np.stack([direction(len(value)) for value in values])

    def follow(**texts: str) -> None:
        sync(index, [IndexItem(id, id, text=text) for id, text in texts.items()], encode)
        index.optimize()

    def first(words: str) -> str | None:
        hits = Index.open(tmp_path / "i").search(direction(0), 3, words=words)
        return hits[0].id if words in hits[0].metadata["text"] else None

    follow(a="a cat", b="a dog here")
    assert (first("cat"), first("dog"), first("zebra")) == ("a", "b", None)
    follow(a="a cat", b="a zebra here", c="the last giraffe")
    assert (first("cat"), first("dog"), first("zebra"), first("giraffe")) == ("a", None, "b", "c")
    stats = index._table.index_stats("text_idx")
    assert (stats.num_indexed_rows, stats.num_unindexed_rows) == (3, 0)
    follow(a="a cat")
    assert (first("cat"), first("giraffe")) == ("a", None)


def test_rows_that_have_not_joined_the_index_are_found_as_well(index: Index) -> None:
    index.add([IndexRow("new", "text", None, "a zebra")], direction(89)[None], new=True)
    assert found(index, "zebra", top=1) == ["new"]


def test_an_index_without_texts_says_so(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "i", FACTS)
    index.add([IndexRow("a", "image", "a.png")], direction(0)[None])
    index.optimize()
    with pytest.raises(DataError, match=r"i has no texts to search by words.*--caption"):
        found(index, "cat")
    index.add([IndexRow("b", "text", None, "a cat")], direction(9)[None])
    with pytest.raises(DataError, match="was made before they could be searched"):
        found(index, "cat")
    index.optimize()
    assert found(index, "cat") == ["b", "a"]


@pytest.mark.parametrize(
    "words",
    ["", " ", "'\"*+-()^~", "cat OR (", "\0", "a" * 100_000, "cat " * 50_000, "NULL; DROP"],
)
def test_any_words_are_only_words(index: Index, words: str) -> None:
    assert sorted(found(index, words)) == list("abcdef")


def test_only_so_many_words_are_looked_up(index: Index) -> None:
    many = " ".join(f"w{i}" for i in range(MAX_WORDS))
    assert found(index, f"{many} crown") == list("abcdef")
    assert found(index, f"crown {many}")[0] == "e"


def test_a_searcher_takes_the_words_of_its_query(index: Index) -> None:
    index.set_origin(Origin(json.dumps("x")))
    asked: list[Any] = []

    class Model:
        def encode(self, query: Any, **options: Any) -> np.ndarray:
            asked.append(query)
            return direction(0)

    searcher = Searcher(index, Model())  # type: ignore[arg-type]
    for query in ("crown", {"text": "crown"}, [{"role": "user", "content": "crown"}]):
        assert searcher.search(query, 1)[0].id == "a"
        assert searcher.search(query, 1, hybrid=True)[0].id == "e"
    blind = Searcher(index)
    assert blind.search(direction(0), 1, hybrid="crown")[0].id == "e"
    asked.clear()
    for query in (direction(0), " ", {"image": "x.png"}):
        with pytest.raises(DataError, match="hybrid search needs words"):
            searcher.search(query, hybrid=True)
    assert not asked, "refused before anything is embedded"


@pytest.mark.parametrize("top", [0, -1])
def test_a_number_of_hits_that_is_none(index: Index, top: int) -> None:
    for words in (None, "crown"):
        with pytest.raises(DataError, match=f"top={top}: give the number of hits, 1 or more"):
            index.search(direction(0), top, words=words)
