"""`cafe embed --engine ray` with two workers writes what the default engine writes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cafe.cli import app
from cafe.errors import CafeError, DataError
from cafe.index import Index

COUNT, SIZE = 9, 2
BROKEN = {3, 4, 5}  # line numbers from 0; shard 2 is broken altogether


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["embed", *map(str, arguments)])


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    source = tmp_path / "a.jsonl"
    texts = ["" if i in BROKEN else f"cat {i} " + "red " * (i % 4) for i in range(COUNT)]
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return source


@pytest.fixture
def local_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray of this test's own, whatever runs on this machine."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
def test_two_workers_write_what_one_process_writes_and_go_on_where_they_were(
    lines: Path, small_dir: Path, tmp_path: Path, local_ray: None
) -> None:
    alone, out, table = tmp_path / "alone", tmp_path / "out", tmp_path / "table"
    run(small_dir, lines, "--out", alone, "--shard-size", SIZE)
    shutil.copytree(alone, out)
    kept = (out / "00000.parquet").stat().st_mtime_ns
    for number in (1, 2, 3, 4):
        (out / f"0000{number}.parquet").unlink()
    with_ray = ("--shard-size", SIZE, "--engine", "ray", "--workers", 2)
    done = run(small_dir, lines, "--out", out, *with_ray)
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stdout == (
        f"4 embeddings in 4 shards of {out}, 1 shards were there, 3 inputs skipped\n"
    )
    assert [f"line {i + 1}: neither text nor image" in done.stderr for i in range(3, 6)] == [
        True
    ] * 3
    names = sorted(file.name for file in alone.iterdir())
    assert sorted(file.name for file in out.iterdir()) == names
    assert json.loads((out / "shards.json").read_text()) == json.loads(
        (alone / "shards.json").read_text()
    )
    for name in names[:-1]:
        same(pq.read_table(alone / name), pq.read_table(out / name))
    assert (out / "00000.parquet").stat().st_mtime_ns == kept

    done = run(small_dir, lines, "--to", table, *with_ray)
    assert done.exit_code == 0, (done.output, done.exception)
    stored = Index.open(table).stored(map(str, range(1, COUNT + 1)))
    assert sorted(stored) == [str(i + 1) for i in range(COUNT) if i not in BROKEN]
    first = pq.read_table(out / "00000.parquet")
    for id, vector in zip(first["id"].to_pylist(), first["embedding"].to_pylist(), strict=True):
        np.testing.assert_allclose(stored[id].vector, vector, atol=1e-5)


def same(a: Any, b: Any) -> None:
    assert a.schema.equals(b.schema, check_metadata=True)
    assert a.drop_columns(["embedding"]).equals(b.drop_columns(["embedding"]))
    left, right = (np.array(t["embedding"].to_pylist(), dtype=np.float32) for t in (a, b))
    np.testing.assert_allclose(left, right, atol=1e-6)  # threads may sum in another order


@pytest.mark.slow
def test_what_a_worker_raises_is_one_line_without_rays_wrapping(
    lines: Path, tmp_path: Path, local_ray: None
) -> None:
    done = run(tmp_path / "none", lines, "--to", tmp_path / "t", "--engine", "ray")
    assert isinstance(done.exception, CafeError)
    assert str(done.exception).startswith(f"model '{tmp_path / 'none'}': no such directory")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("arguments", "ranks", "message"),
    [
        (("--out", "a.parquet", "--engine", "ray"), 1, "writes in shards"),
        (("--to", "a", "--workers", 2), 1, "--workers is for --engine ray"),
        (("--to", "a", "--engine", "ray"), 2, "run it without torchrun"),
    ],
)
def test_options_that_do_not_go_together_are_reported_before_the_model_loads(
    lines: Path, arguments: Any, ranks: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    done = run("no-such-model", lines, *arguments)
    assert isinstance(done.exception, DataError)
    assert message in str(done.exception)


def test_without_ray_the_error_names_the_extra(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = run("tiny", lines, "--to", tmp_path / "t", "--engine", "ray")
    assert isinstance(done.exception, CafeError)
    assert "pip install 'cafe-vlm[ray]'" in str(done.exception)
