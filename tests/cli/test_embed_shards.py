"""`cafe embed` in shards: each is whole or not there, none is made twice, ranks share them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import cafe.cli.shards as shards_module
from cafe.cli import app
from cafe.errors import DataError
from cafe.index import Index
from cafe.model.vlm import CAFe

COUNT, SIZE = 11, 3
BROKEN = {4, 6, 7, 8}  # line numbers from 0; shard 2 is broken altogether


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    source = tmp_path / "a.jsonl"
    texts = ["" if i in BROKEN else f"cat {i} " + "red " * (i % 4) for i in range(COUNT)]
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return source


def run(model: object, source: Path, *arguments: object) -> Any:
    return CliRunner().invoke(app, ["embed", str(model), str(source), *map(str, arguments)])


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count)):
        monkeypatch.setenv(name, str(value))


def table_of(out: Path) -> tuple[list[str], np.ndarray]:
    """All shards in order, as one."""
    parts = [pq.read_table(file) for file in sorted(out.glob("*.parquet"))]
    ids = [id for part in parts for id in part["id"].to_pylist()]
    return ids, np.array([row for part in parts for row in part["embedding"].to_pylist()])


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that the model embeds."""
    seen: list[str] = []
    real = CAFe.encode

    def encode(self: CAFe, inputs: Any, **options: Any) -> np.ndarray:
        seen.extend(inputs)
        return real(self, inputs, **options)

    monkeypatch.setattr(CAFe, "encode", encode)
    return seen


def test_shards_together_are_the_one_file(
    lines: Path, small_dir: Path, tmp_path: Path, encoded: list[str]
):
    whole, out = tmp_path / "whole.parquet", tmp_path / "out"
    run(small_dir, lines, "--out", whole)
    done = run(small_dir, lines, "--out", out, "--shard-size", SIZE)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"7 embeddings in 4 shards of {out}, 4 inputs skipped\n"
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

    encoded.clear()
    (out / "00001.parquet").unlink()
    done = run(small_dir, lines, "--out", out, "--shard-size", SIZE)
    assert done.stdout == (
        f"2 embeddings in 1 shards of {out}, 3 shards were there, 1 inputs skipped\n"
    )
    assert encoded == ["cat 3 red red red ", "cat 5 red "]
    assert table_of(out)[0] == ids


def test_ranks_of_torchrun_make_each_shard_once(
    lines: Path,
    small_dir: Path,
    tmp_path: Path,
    encoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    out = tmp_path / "out"
    as_rank(monkeypatch, 1, 2)
    done = run(small_dir, lines, "--out", out, "--shard-size", SIZE)
    assert done.stdout.startswith(f"rank 1: 4 embeddings in 2 shards of {out}")
    assert sorted(f.name for f in out.glob("*.parquet")) == ["00001.parquet", "00003.parquet"]
    as_rank(monkeypatch, 0, 2)
    run(small_dir, lines, "--out", out, "--shard-size", SIZE)
    assert table_of(out)[0] == [str(i + 1) for i in range(COUNT) if i not in BROKEN]
    assert len(encoded) == len(set(encoded)) == COUNT - len(BROKEN)


def test_a_shard_that_was_cut_off_is_made_again(
    lines: Path, small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    real, blocks = shards_module.encode_block, 0

    def dies(vlm: CAFe, block: Any) -> Any:
        nonlocal blocks
        blocks += 1
        if blocks == 2:
            raise KeyboardInterrupt
        return real(vlm, block)

    monkeypatch.setattr(shards_module, "encode_block", dies)
    run(small_dir, lines, "--out", out, "--shard-size", SIZE)
    assert sorted(f.name for f in out.iterdir()) == ["00000.parquet", "shards.json"]
    done = run(small_dir, lines, "--out", out, "--shard-size", SIZE)
    assert "4 embeddings in 3 shards" in done.stdout
    assert "1 shards were there" in done.stdout


@pytest.mark.parametrize(
    ("change", "told"),
    [("size", "another shard size (3, now 4)"), ("lines", "another inputs (11, now 12)")],
)
def test_shards_of_another_run_are_not_mixed(
    lines: Path, small_dir: Path, tmp_path: Path, change: str, told: str
):
    out = tmp_path / "out"
    run(small_dir, lines, "--out", out, "--shard-size", SIZE)
    if change == "lines":
        lines.write_text(lines.read_text() + '\n{"text": "more"}')
    done = run(small_dir, lines, "--out", out, "--shard-size", SIZE + (change == "size"))
    assert isinstance(done.exception, DataError)
    assert told in str(done.exception)


def test_a_table_takes_each_shard_once_and_can_be_searched(
    lines: Path,
    small_dir: Path,
    tmp_path: Path,
    encoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    uri = tmp_path / "table"
    as_rank(monkeypatch, 1, 2)
    done = run(small_dir, lines, "--to", uri, "--shard-size", SIZE)
    assert done.exit_code == 0, done.exception
    assert Index.open(uri).values("shard") == {1, 3}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    done = run(small_dir, lines, "--to", uri, "--shard-size", SIZE)
    assert done.stdout == (
        f"3 embeddings in 2 shards of {uri}, 2 shards were there, 3 inputs skipped\n"
    )
    assert len(encoded) == len(set(encoded)) == COUNT - len(BROKEN)
    done = CliRunner().invoke(app, ["search", str(uri), "cat 9 red ", "--top", "1", "--json"])
    (hit,) = json.loads(done.stdout)["hits"]
    assert (hit["id"], hit["shard"], hit["kind"]) == ("10", 3, "text")
    assert hit["score"] == pytest.approx(1, abs=1e-5)


def test_a_table_tells_ids_that_come_twice(small_dir: Path, tmp_path: Path):
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps({"id": i, "text": f"cat {i}"}) for i in "aba"))
    done = run(small_dir, source, "--to", tmp_path / "t", "--shard-size", 2)
    assert "line 3: id 'a' comes twice" in done.stderr
    assert sorted(Index.open(tmp_path / "t").known()) == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "ranks", "told"),
    [
        ((), 1, "name where to write"),
        (("--out", "a.parquet", "--to", "b"), 1, "name where to write"),
        (("--out", "a.parquet"), 2, "2 processes cannot write one file"),
        (("--out", "a.parquet", "--shard-size", 2), 1, "name a folder"),
    ],
)
def test_where_to_write_must_be_clear(
    lines: Path, arguments: Any, ranks: int, told: str, monkeypatch: pytest.MonkeyPatch
):
    assert "RANK" not in os.environ
    as_rank(monkeypatch, 0, ranks)
    done = run("no-such-model", lines, *arguments)
    assert isinstance(done.exception, DataError)
    assert told in str(done.exception)
