"""Embeddings in shards: each is whole or not there, none is made twice, ranks share them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cafe.errors import DataError
from cafe.index import Index
from cafe.retrieval.blocks import EncodeInputs
from cafe.retrieval.embed import embed_dataset

COUNT, SIZE = 11, 3
BROKEN = {4, 6, 7, 8}  # line numbers from 0; shard 2 is broken altogether


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    source = tmp_path / "a.jsonl"
    texts = ["" if i in BROKEN else f"cat {i} " + "red " * (i % 4) for i in range(COUNT)]
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return source


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count)):
        monkeypatch.setenv(name, str(value))


def table_of(out: Path) -> tuple[list[str], np.ndarray]:
    """All shards in order, as one."""
    parts = [pq.read_table(file) for file in sorted(out.glob("*.parquet"))]
    ids = [id for part in parts for id in part["id"].to_pylist()]
    return ids, np.array([row for part in parts for row in part["embedding"].to_pylist()])


class Recorder:
    """The small model's `encode`, which keeps what it was asked to embed."""

    def __init__(self, encode: EncodeInputs) -> None:
        self._encode = encode
        self.inputs: list[str] = []

    def __call__(self, inputs: Any) -> np.ndarray:
        self.inputs.extend(inputs)
        return self._encode(inputs)


@pytest.fixture
def encode(small_model: Any) -> Recorder:
    return Recorder(small_model.encode)


def test_shards_together_are_the_one_file(
    lines: Path, small_dir: Path, tmp_path: Path, encode: Recorder
):
    whole, out = tmp_path / "whole.parquet", tmp_path / "out"
    embed_dataset(small_dir, lines, whole, encode=encode)
    report = embed_dataset(small_dir, lines, out, shard_size=SIZE, encode=encode)
    assert (report.embedded, report.shards, len(report.skipped)) == (7, 4, 4)
    assert (report.uri, report.shards_present) == (str(out), 0)
    assert report.paths == [out / f"0000{i}.parquet" for i in range(4)]
    assert sorted(f.name for f in out.iterdir()) == [
        *(f"0000{i}.parquet" for i in range(4)),
        "shards.json",
    ]
    table = pq.read_table(whole)
    ids, vectors = table_of(out)
    assert ids == table["id"].to_pylist() == [str(i + 1) for i in range(COUNT) if i not in BROKEN]
    np.testing.assert_allclose(vectors, np.array(table["embedding"].to_pylist()), atol=1e-5)
    empty = pq.read_table(out / "00002.parquet")
    assert (empty.num_rows, empty.schema) == (0, table.schema)

    encode.inputs.clear()
    (out / "00001.parquet").unlink()
    report = embed_dataset(small_dir, lines, out, shard_size=SIZE, encode=encode)
    assert (report.embedded, report.shards, report.shards_present) == (2, 1, 3)
    assert [record.location for record in report.skipped] == [f"{lines}, line 5"]
    assert encode.inputs == ["cat 3 red red red ", "cat 5 red "]
    assert table_of(out)[0] == ids


def test_ranks_of_torchrun_make_each_shard_once(
    lines: Path,
    small_dir: Path,
    tmp_path: Path,
    encode: Recorder,
    monkeypatch: pytest.MonkeyPatch,
):
    out = tmp_path / "out"
    as_rank(monkeypatch, 1, 2)
    report = embed_dataset(small_dir, lines, out, shard_size=SIZE, encode=encode)
    assert (report.rank.index, report.embedded, report.shards) == (1, 4, 2)
    assert sorted(f.name for f in out.glob("*.parquet")) == ["00001.parquet", "00003.parquet"]
    as_rank(monkeypatch, 0, 2)
    embed_dataset(small_dir, lines, out, shard_size=SIZE, encode=encode)
    assert table_of(out)[0] == [str(i + 1) for i in range(COUNT) if i not in BROKEN]
    assert len(encode.inputs) == len(set(encode.inputs)) == COUNT - len(BROKEN)


def test_a_shard_that_was_cut_off_is_made_again(
    lines: Path, small_dir: Path, tmp_path: Path, encode: Recorder
):
    out = tmp_path / "out"

    def dies(inputs: Any) -> np.ndarray:
        if "cat 3 red red red " in inputs:
            raise KeyboardInterrupt
        return encode(inputs)

    with pytest.raises(KeyboardInterrupt):
        embed_dataset(small_dir, lines, out, shard_size=SIZE, encode=dies)
    assert sorted(f.name for f in out.iterdir()) == ["00000.parquet", "shards.json"]
    report = embed_dataset(small_dir, lines, out, shard_size=SIZE, encode=encode)
    assert (report.embedded, report.shards, report.shards_present) == (4, 3, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [("size", "another shard size (3, now 4)"), ("lines", "another inputs (11, now 12)")],
)
def test_shards_of_another_run_are_not_mixed(
    lines: Path, small_dir: Path, tmp_path: Path, encode: Recorder, change: str, message: str
):
    out = tmp_path / "out"
    embed_dataset(small_dir, lines, out, shard_size=SIZE, encode=encode)
    if change == "lines":
        lines.write_text(lines.read_text() + '\n{"text": "more"}')
    size = SIZE + (change == "size")
    with pytest.raises(DataError) as failure:
        embed_dataset(small_dir, lines, out, shard_size=size, encode=encode)
    assert message in str(failure.value)


def test_a_table_takes_each_shard_once_and_can_be_searched(
    lines: Path,
    small_dir: Path,
    tmp_path: Path,
    encode: Recorder,
    monkeypatch: pytest.MonkeyPatch,
):
    uri = tmp_path / "table"
    as_rank(monkeypatch, 1, 2)
    embed_dataset(small_dir, lines, to=uri, shard_size=SIZE, encode=encode)
    assert Index.open(uri).values("shard") == {1, 3}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    report = embed_dataset(small_dir, lines, to=uri, shard_size=SIZE, encode=encode)
    assert (report.embedded, report.shards, report.shards_present) == (3, 2, 2)
    assert (report.uri, report.paths, len(report.skipped)) == (str(uri), [], 3)
    assert len(encode.inputs) == len(set(encode.inputs)) == COUNT - len(BROKEN)
    (hit,) = Index.open(uri).search(encode(["cat 9 red "])[0], top=1)
    assert (hit.id, hit.metadata["shard"], hit.metadata["kind"]) == ("10", 3, "text")
    assert hit.score == pytest.approx(1, abs=1e-5)


def test_a_table_skips_ids_that_come_twice(small_dir: Path, tmp_path: Path, encode: Recorder):
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps({"id": i, "text": f"cat {i}"}) for i in "aba"))
    report = embed_dataset(small_dir, source, to=tmp_path / "t", shard_size=2, encode=encode)
    assert [(r.location, r.reason) for r in report.skipped] == [
        (f"{source}, line 3", "id 'a' comes twice")
    ]
    assert sorted(Index.open(tmp_path / "t").known()) == ["a", "b"]
