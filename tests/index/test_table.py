"""An index: exact search is numpy's, rows are told apart by id, SQL and models are checked."""

from __future__ import annotations

import builtins
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import cafe.index.table as table_module
from cafe.errors import CafeError, DataError
from cafe.index import Index, IndexRow, ModelFacts, Origin
from cafe.index.rows import column_name, column_types, plain
from cafe.index.store import lance_errors

DIMENSION = 16
FACTS = ModelFacts("tiny", "weights-a", "prompt-a", DIMENSION)


def vectors_of(count: int, seed: int = 0, clusters: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, DIMENSION))
    if clusters:
        centres = 3 * rng.normal(size=(clusters, DIMENSION))
        vectors += centres[rng.integers(0, clusters, count)]
    return vectors.astype(np.float32)


def rows_of(count: int, start: int = 0) -> list[IndexRow]:
    return [
        IndexRow(f"{i:05d}", "image", f"{i:05d}.png", f"text {i}", f"h{i}", "r", 10 * i, 5)
        for i in range(start, start + count)
    ]


def filled(uri: Path, count: int, **options: Any) -> tuple[Index, np.ndarray]:
    index, vectors = Index.create(uri, FACTS), vectors_of(count, **options)
    index.add(rows_of(count), vectors, new=True)
    return index, vectors


def cosines(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The dense twin."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    return vectors.astype(np.float64) @ query / (lengths * np.linalg.norm(query))


def test_exact_search_is_the_dense_twin(tmp_path: Path):
    index, vectors = filled(tmp_path / "i", 300)
    for query in vectors_of(5, seed=1):
        hits = index.search(query, top=7)
        scores = cosines(vectors, query)
        best = np.argsort(-scores)[:7]
        assert [hit.id for hit in hits] == [f"{i:05d}" for i in best]
        np.testing.assert_allclose([hit.score for hit in hits], scores[best], atol=1e-6)
    first = index.search(vectors[3], top=1)[0]
    assert (first.id, first.score) == ("00003", pytest.approx(1.0, abs=1e-6))
    assert first.metadata == {
        "kind": "image",
        "path": "00003.png",
        "text": "text 3",
        "width": 30,
        "height": 5,
    }
    assert len(index.search(vectors[0], top=1000)) == 300


def test_sql_filters_before_the_nearest_are_chosen(tmp_path: Path):
    index, vectors = filled(tmp_path / "i", 100)
    hits = index.search(vectors[0], top=3, where="width >= 900 AND text LIKE 'text%'")
    scores = cosines(vectors, vectors[0])
    assert [hit.id for hit in hits] == [
        f"{i:05d}" for i in sorted(range(90, 100), key=lambda i: -scores[i])[:3]
    ]
    assert index.search(vectors[0], where="width < 0") == []


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("nope = 1", "No field named nope"),
        ("width = = 3", "Error parsing statement"),
        ("width", "does not return a boolean"),
        ("width = 'abc'", "Received literal"),
        ("", "expected: an expression"),
    ],
)
def test_bad_sql_is_one_clear_error_that_lists_the_columns(tmp_path: Path, where: str, reason: str):
    index, vectors = filled(tmp_path / "i", 3)
    with pytest.raises(DataError) as error:
        index.search(vectors[0], where=where)
    message = str(error.value)
    assert reason.lower() in message.lower()
    assert message.startswith(f"where {where!r} cannot be used")
    assert message.endswith(
        "compare the columns id, kind, path, text, width, height with =, <, LIKE, IN, BETWEEN or "
        "IS NULL"
    )
    assert ".rs:" not in message
    assert "\n" not in message


def test_a_row_that_comes_again_replaces_the_first(tmp_path: Path):
    index, vectors = filled(tmp_path / "i", 10)
    again = dataclasses.replace(rows_of(1, start=4)[0], text="new")
    index.add([again, *rows_of(1, start=50)], np.stack([-vectors[4], vectors[5]]))
    assert len(index) == 11
    hit = index.search(-vectors[4], top=1)[0]
    assert (hit.id, hit.metadata["text"]) == ("00004", "new")
    assert index.known()["00004"] == ("image", "h4", "r")


def test_an_id_twice_in_one_write_is_refused_and_nothing_is_written(tmp_path: Path):
    index, vectors = filled(tmp_path / "i", 2)
    with pytest.raises(DataError, match="occurs twice"):
        index.add([*rows_of(1, start=7), *rows_of(1, start=7)], vectors)
    assert len(index) == 2


def test_ids_with_quotes_are_found_and_deleted(tmp_path: Path):
    index = Index.create(tmp_path / "i", FACTS)
    rows = [IndexRow("it's", "text", text="a"), IndexRow("b", "text", text="b")]
    index.add(rows, vectors_of(2))
    assert set(index.stored(["it's", "none"])) == {"it's"}
    index.delete(["it's"])
    assert set(index.known()) == {"b"}


def test_rows_that_two_writers_wrote_twice_are_dropped_to_be_made_again(tmp_path: Path):
    index, vectors = filled(tmp_path / "i", 3)
    index.add(rows_of(1), vectors[:1], new=True)
    assert len(index) == 4
    assert set(index.known()) == {"00001", "00002"}
    assert len(index) == 2


def test_vectors_are_stored_with_length_one(tmp_path: Path):
    index, vectors = filled(tmp_path / "i", 4)
    stored = index.stored(["00002"])["00002"]
    assert (stored.hash, stored.width, stored.height) == ("h2", 20, 5)
    np.testing.assert_allclose(stored.vector, vectors[2] / np.linalg.norm(vectors[2]), atol=1e-6)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_vector_without_direction_names_its_row(tmp_path: Path, bad: float):
    index, vectors = filled(tmp_path / "i", 1)
    vectors = np.concatenate([vectors, np.full((1, DIMENSION), bad, np.float32)])
    with pytest.raises(DataError, match="00009 is zero or not finite"):
        index.add(rows_of(2, start=8), vectors)
    assert len(index) == 1


def test_vectors_of_another_dimension_are_refused(tmp_path: Path):
    index, vectors = filled(tmp_path / "i", 1)
    with pytest.raises(DataError, match=r"expected \(1, 16\)"):
        index.add(rows_of(1), vectors[:, :8])
    with pytest.raises(DataError, match=r"expected \(1, 16\)"):
        index.search(vectors[0, :8])
    with pytest.raises(DataError, match="search one vector"):
        index.search(vectors)


def test_a_query_that_is_no_vector_needs_encode(tmp_path: Path):
    index, vectors = filled(tmp_path / "i", 5)
    with pytest.raises(DataError, match="open the index with encode="):
        index.search("a cat")
    asked: list[Any] = []

    def encode(values: Any) -> np.ndarray:
        asked.extend(values)
        return vectors[3:4]

    index = Index.open(tmp_path / "i", encode=encode)
    assert index.search("a cat", top=1)[0].id == "00003"
    assert asked == ["a cat"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"weights": "weights-b"}, "other weights"),
        ({"prompt": "prompt-b"}, "another embedding prompt"),
        ({"dimension": 32}, "dimension 32 instead of 16"),
    ],
)
def test_another_model_is_an_error_that_says_what_to_do(
    tmp_path: Path, change: Any, difference: str
):
    Index.create(tmp_path / "i", FACTS, origin=Origin("/photos", "/photos"))
    assert (
        Index.open(tmp_path / "i", model=dataclasses.replace(FACTS, name="a/copy")).model == FACTS
    )
    with pytest.raises(DataError) as error:
        Index.open(tmp_path / "i", model=dataclasses.replace(FACTS, name="other", **change))
    message = str(error.value)
    assert f"model 'tiny', and 'other' has {difference}" in message
    assert "use tiny, or index again" in message
    assert "cafe index other /photos --to NEW_DIR" in message


def test_what_is_known_is_still_known_after_writes_compaction_and_reopening(tmp_path: Path):
    origin = Origin("/photos", "/photos")
    index = Index.create(tmp_path / "i", FACTS, origin=origin, columns={"shard": pa.int32()})
    for start in range(0, 40, 10):
        index.add(rows_of(10, start=start), vectors_of(10, seed=start))
    index.add(rows_of(5), vectors_of(5, seed=9))
    index.delete(["00007"])
    index.add_columns({"year": pa.int64()})
    index.compact()
    again = Index.open(tmp_path / "i")
    assert (again.model, again.origin, len(again)) == (FACTS, origin, 39)
    again.set_origin(Origin("/pics", "/pics"))
    assert Index.open(tmp_path / "i").origin == Origin("/pics", "/pics")
    assert list(again.columns)[-2:] == ["shard", "year"]


def test_no_index_says_how_to_make_one_and_leaves_no_folder(tmp_path: Path):
    with pytest.raises(DataError, match="there is none; make one: cafe index MODEL FOLDER --to"):
        Index.open(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert Index.find(tmp_path) is None
    Index.create(tmp_path / "i", FACTS)
    with pytest.raises(DataError, match="already exists"):
        Index.create(tmp_path / "i", FACTS)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("folder", "damage"),
    [
        ("data", cut),
        ("data", Path.unlink),
        ("_versions", cut),
        ("_versions", lambda file: file.write_bytes(b"")),
    ],
)
def test_a_damaged_index_is_one_error_that_says_what_to_do(
    tmp_path: Path, folder: str, damage: Any
):
    uri = tmp_path / "photos.index"
    _, vectors = filled(uri, 3)
    files = (uri / "items.lance" / folder).glob("*.lance" if folder == "data" else "*.manifest")
    damage(min(files))  # the newest version: their names count down
    with pytest.raises(DataError) as caught:
        Index.open(uri).search(vectors[0])
    text = str(caught.value)
    assert text.startswith(f"index {uri}: ")
    assert text.endswith(
        f"; the index is damaged: delete it, then make it again: cafe index MODEL FOLDER --to {uri}"
    )


def test_a_full_disk_says_that_nothing_is_lost():
    with pytest.raises(DataError) as caught, lance_errors("photos.index"):
        raise RuntimeError("lance error: No space left on device (os error 28), rust/io.rs:7:9")
    assert str(caught.value) == (
        "index photos.index: lance error: No space left on device (os error 28); free space "
        "there, then run the same command again: finished rows are kept"
    )


def test_an_empty_index_finds_nothing(tmp_path: Path):
    index = Index.create(tmp_path / "i", FACTS)
    assert index.search(np.ones(DIMENSION, np.float32)) == []
    assert index.optimize() is None


def test_without_lancedb_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == "lancedb":
            raise ImportError("No module named 'lancedb'")
        return real(name, *args, **options)

    for name in [n for n in sys.modules if n.split(".")[0] == "lancedb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(CafeError, match=r"pip install cafe-vlm\[search\]"):
        Index.create(tmp_path / "i", FACTS)


# ---------------------------------------------------------------------- other columns


def test_other_columns_are_typed_and_can_be_asked_for(tmp_path: Path):
    extras = [
        {"year": 1999, "score": 1, "tags": plain(["a", "b"]), "seen": True, "mixed": 1},
        {"year": None, "score": 2.5, "seen": False, "mixed": "one"},
    ]
    types = column_types(extras)
    assert {name: str(type) for name, type in types.items()} == {
        "year": "int64",
        "score": "double",
        "tags": "string",
        "seen": "bool",
        "mixed": "string",
    }
    index = Index.create(tmp_path / "i", FACTS)
    index.add_columns(types)
    rows = [dataclasses.replace(r, extra=e) for r, e in zip(rows_of(2), extras, strict=True)]
    vectors = vectors_of(2)
    index.add(rows, vectors)
    hits = index.search(vectors[0], where="year > 1990 AND seen AND tags LIKE '%\"b\"%'")
    assert [hit.id for hit in hits] == ["00000"]
    assert hits[0].metadata["mixed"] == "1"
    bad = dataclasses.replace(rows_of(1, start=7)[0], extra={"year": "long ago"})
    with pytest.raises(DataError, match="00007: year is 'long ago', and this index holds int64"):
        index.add([bad], vectors[:1])


def test_values_become_what_json_can_hold():
    values = [1, 2.5, True, None, "a", np.float32(0.5), float("nan"), np.float64("inf"), {"a": [1]}]
    assert [plain(v) for v in values] == [1, 2.5, True, None, "a", 0.5, None, None, '{"a": [1]}']


def test_columns_take_no_name_of_ours():
    assert [column_name(n) for n in ("year", "Hash", "_rowid", "a.b c", "width")] == [
        "year",
        "Hash_",
        "rowid_",
        "a_b_c",
        "width_",
    ]


# ---------------------------------------------------------------------- approximate search


def near(vectors: np.ndarray, query: np.ndarray, top: int) -> list[str]:
    return [f"{i:05d}" for i in np.argsort(-cosines(vectors, query))[:top]]


@pytest.mark.slow
def test_beyond_the_threshold_search_is_approximate_and_its_recall_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    index, vectors = filled(tmp_path / "i", 3000, clusters=40)
    assert index.optimize(threshold=3001) is None
    measured = index.optimize(threshold=3000)
    assert measured is not None
    assert (measured.partitions, measured.rows, measured.queries) == (55, 3000, 100)
    assert measured.recall >= 0.95
    index = Index.open(tmp_path / "i")
    assert index.approximate == measured

    queries = vectors_of(30, seed=2, clusters=40)
    shares = [
        len({h.id for h in index.search(q)} & set(near(vectors, q, 10))) / 10 for q in queries
    ]
    assert np.mean(shares) >= 0.9
    hits = index.search(queries[0])
    scores = cosines(vectors, queries[0])
    np.testing.assert_allclose(
        [h.score for h in hits], [scores[int(h.id)] for h in hits], atol=1e-5
    )
    exact = [h.id for h in index.search(queries[0], exact=True)]
    assert exact == near(vectors, queries[0], 10)
    # The index is used: looking into one partition of 55 misses what lies in others.
    one = dataclasses.replace(measured, probes=1, refine=1)
    missed = [
        {h.id for h in index._nearest(q, 10, None, one)} != set(near(vectors, q, 10))
        for q in queries
    ]
    assert any(missed)

    where = "width < 300"
    assert [h.id for h in index.search(queries[0], top=5, where=where)] == near(
        vectors[:30], queries[0], 5
    )
    monkeypatch.setattr(table_module, "APPROXIMATE_ROWS", 0)  # the filter alone finds enough
    found = index.search(queries[0], top=5, where=where)
    assert len(found) == 5
    assert all(hit.metadata["width"] < 300 for hit in found)


@pytest.mark.slow
def test_rows_added_later_are_found_and_a_doubled_table_is_trained_again(tmp_path: Path):
    index, _ = filled(tmp_path / "i", 1000, clusters=10)
    first = index.optimize(threshold=500)
    more = vectors_of(600, seed=3)
    index.add(rows_of(600, start=1000), more)
    assert index.search(more[5], top=1)[0].id == "01005", "before it is in the index"
    second = index.optimize(threshold=500)
    assert second is not None
    assert first is not None
    assert second.rows == first.rows == 1000
    assert index.search(more[5], top=1)[0].id == "01005"
    index.add(rows_of(500, start=2000), vectors_of(500, seed=4))
    third = index.optimize(threshold=500)
    assert third is not None
    assert third.rows == 2100
    index.delete(f"{i:05d}" for i in range(0, 2500) if i >= 400)
    assert index.optimize(threshold=500) is None
    assert index.approximate is None
    assert index.search(more[5], top=3)


def test_queries_of_another_kind_are_measured_if_given(tmp_path: Path):
    index, vectors = filled(tmp_path / "i", 1000, clusters=10)
    queries = vectors_of(20, seed=8)
    measured = index.optimize(queries, threshold=500)
    assert measured is not None
    assert measured.queries == 20
    shares = [
        len({h.id for h in index.search(q)} & set(near(vectors, q, 10))) / 10 for q in queries
    ]
    assert measured.recall == pytest.approx(float(np.mean(shares)))
