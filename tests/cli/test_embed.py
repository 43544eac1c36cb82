"""`cafe embed`: what it prints, its exit codes, and options that do not go together."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cafe.cli import app
from cafe.errors import DataError
from cafe.index import Index

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


def test_a_file_is_counted_and_skipped_lines_are_on_stderr(
    command_line: Any, small_dir: Path, tmp_path: Path
):
    source, out = tmp_path / "a.txt", tmp_path / "deep" / "a.parquet"
    source.write_bytes("\ufeffred\r\n\r\nmug ü\nlast".encode())
    code, stdout, stderr = command_line("embed", small_dir, source, "--out", out)
    assert code == 0
    assert stdout == f"3 embeddings in {out}, 1 inputs skipped\n"
    assert stderr == f"skipped {source}, line 2: an empty line\n"
    assert pq.read_table(out)["id"].to_pylist() == ["1", "3", "4"]


def test_shards_are_counted_and_a_second_run_makes_what_is_missing(
    lines: Path, small_dir: Path, tmp_path: Path
):
    out = tmp_path / "out"
    done = run(small_dir, lines, "--out", out, "--shard-size", SIZE)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"7 embeddings in 4 shards of {out}, 4 inputs skipped\n"
    (out / "00001.parquet").unlink()
    done = run(small_dir, lines, "--out", out, "--shard-size", SIZE)
    assert done.stdout == (
        f"2 embeddings in 1 shards of {out}, 3 shards were there, 1 inputs skipped\n"
    )


def test_a_rank_of_torchrun_says_which_it_is(
    lines: Path, small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    as_rank(monkeypatch, 1, 2)
    done = run(small_dir, lines, "--out", out, "--shard-size", SIZE)
    assert done.stdout.startswith(f"rank 1: 4 embeddings in 2 shards of {out}")


@pytest.mark.slow
def test_a_table_is_searched_with_cafe_search(lines: Path, small_dir: Path, tmp_path: Path):
    uri = tmp_path / "table"
    done = run(small_dir, lines, "--to", uri, "--shard-size", SIZE)
    assert done.exit_code == 0, done.exception
    done = run(small_dir, lines, "--to", uri, "--shard-size", SIZE)
    # A shard that has no row leaves no trace in a table.
    assert done.stdout == (
        f"0 embeddings in 1 shards of {uri}, 3 shards were there, 3 inputs skipped\n"
    )
    done = CliRunner().invoke(app, ["search", str(uri), "cat 9 red ", "--top", "1", "--json"])
    (hit,) = json.loads(done.stdout)["hits"]
    assert (hit["id"], hit["shard"], hit["kind"]) == ("10", 3, "text")
    assert hit["score"] == pytest.approx(1, abs=1e-5)


def test_an_id_that_comes_twice_in_a_table_is_on_stderr(small_dir: Path, tmp_path: Path):
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps({"id": i, "text": f"cat {i}"}) for i in "aba"))
    done = run(small_dir, source, "--to", tmp_path / "t", "--shard-size", 2)
    assert "line 3: id 'a' comes twice" in done.stderr
    assert sorted(Index.open(tmp_path / "t").known()) == ["a", "b"]


@pytest.mark.parametrize("name", ["a.csv", "gone.txt", "empty"])
def test_a_source_without_records_is_one_error(command_line: Any, tmp_path: Path, name: str):
    (tmp_path / "a.csv").touch()
    (tmp_path / "empty").mkdir()
    code, _, err = command_line(
        "embed", "no-such-model", tmp_path / name, "--out", tmp_path / "out.parquet"
    )
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: {tmp_path / name}: ")


def test_nothing_to_embed_is_an_error_after_the_skipped_lines(
    command_line: Any, small_dir: Path, tmp_path: Path
):
    source, out = tmp_path / "a.txt", tmp_path / "a.parquet"
    source.write_text("\n")
    code, _, err = command_line("embed", small_dir, source, "--out", out)
    assert code == 2
    assert err.splitlines()[-1] == f"error: {source}: nothing to embed (1 inputs skipped)"


def test_an_impossible_output_is_reported_before_the_model_loads(command_line: Any, tmp_path: Path):
    source = tmp_path / "a.txt"
    source.write_text("red\n")
    code, _, err = command_line("embed", "no-such-model", source, "--out", source / "out.parquet")
    assert code == 2
    assert "cannot be written" in err
    code, _, err = command_line("embed", "no-such-model", source, "--out", tmp_path)
    assert err == f"error: {tmp_path}: is a folder; name a file\n"


@pytest.mark.parametrize(
    ("arguments", "ranks", "message"),
    [
        ((), 1, "name where to write"),
        (("--out", "a.parquet", "--to", "b"), 1, "name where to write"),
        (("--out", "a.parquet"), 2, "2 processes cannot write one file"),
        (("--out", "a.parquet", "--shard-size", 2), 1, "name a folder"),
    ],
)
def test_where_to_write_must_be_clear(
    lines: Path, arguments: Any, ranks: int, message: str, monkeypatch: pytest.MonkeyPatch
):
    assert "RANK" not in os.environ
    as_rank(monkeypatch, 0, ranks)
    done = run("no-such-model", lines, *arguments)
    assert isinstance(done.exception, DataError)
    assert message in str(done.exception)
