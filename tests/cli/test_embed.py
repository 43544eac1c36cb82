"""`cafe embed`: every usable input ends in the file, every broken one is named, nothing is lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

import cafe.cli.inputs
from cafe.cli.inputs import open_source
from cafe.errors import DataError

DIMENSIONS = 3


class FakeModel:
    """Embeds an input as (length of its text, width, height of its picture)."""

    @classmethod
    def from_pretrained(cls, name: str) -> FakeModel:
        return cls()

    def encode(self, inputs: list[Any]) -> np.ndarray:
        return np.array([self._one(value) for value in inputs], dtype=np.float32)

    def _one(self, value: Any) -> tuple[int, int, int]:
        text = value if isinstance(value, str) else value["text"] if isinstance(value, dict) else ""
        picture = value["image"] if isinstance(value, dict) else value
        if text == "too long":
            raise DataError("longer than the context")
        return (len(text), *(picture.size if isinstance(picture, PIL.Image.Image) else (0, 0)))


@pytest.fixture
def embed(monkeypatch: pytest.MonkeyPatch, command_line: Any):
    fake = ModuleType("cafe.model.vlm")
    fake.CAFe = FakeModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cafe.model.vlm", fake)

    def run(source: Path, out: Path) -> tuple[int, str, list[str]]:
        code, out_text, err = command_line("embed", "tiny", source, "--out", out)
        return code, out_text, err.splitlines()

    return run


def picture(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    PIL.Image.new("RGB", (width, height)).save(path)


def test_a_text_file_is_one_embedding_a_line(embed, tmp_path: Path):
    source, out = tmp_path / "a.txt", tmp_path / "deep" / "a.parquet"
    source.write_bytes("\ufeffred\r\n\r\nmug ü\nlast".encode())
    code, stdout, skipped = embed(source, out)
    table = pq.read_table(out)
    assert code == 0
    assert stdout == f"3 embeddings in {out}, 1 inputs skipped\n"
    assert skipped == [f"skipped {source}, line 2: an empty line"]
    assert table.column_names == ["id", "text", "embedding"]
    assert table["id"].to_pylist() == ["1", "3", "4"]
    assert table["text"].to_pylist() == ["red", "mug ü", "last"]
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[3]"
    assert [row[0] for row in table["embedding"].to_pylist()] == [3, 5, 4]
    assert table.schema.metadata[b"cafe.model"] == b"tiny"
    assert [path.name for path in out.parent.iterdir()] == ["a.parquet"]


def test_a_json_file_mixes_texts_and_pictures_and_names_every_broken_line(embed, tmp_path: Path):
    picture(tmp_path / "sub" / "mug.png", 5, 4)
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    lines = [
        json.dumps({"text": "red"}),
        json.dumps({"id": "pair", "text": "blue", "image": "sub/mug.png", "license": "CC0"}),
        json.dumps({"image": "sub/mug.png"}),
        "{not json",
        "[1]",
        json.dumps({"image": "cut.jpg"}),
        json.dumps({"image": "gone.jpg"}),
        json.dumps({"image": "../secret.png"}),
        json.dumps({"image": "/etc/secret.png"}),
        json.dumps({"text": "  "}),
        json.dumps({"text": 3}),
        json.dumps({"text": "too long"}),
        json.dumps({"text": "half \ud83d"}),
    ]
    source, out = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    source.write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    code, stdout, skipped = embed(source, out)
    table = pq.read_table(out)
    assert code == 0
    assert stdout == f"3 embeddings in {out}, 11 inputs skipped\n"
    assert table["id"].to_pylist() == ["1", "pair", "3"]
    assert table["text"].to_pylist() == ["red", "blue", None]
    mug = str(tmp_path / "sub" / "mug.png")
    assert table["path"].to_pylist() == [None, mug, mug]
    assert table["embedding"].to_pylist() == [[3, 0, 0], [4, 5, 4], [0, 5, 4]]
    reasons = {line.split("line ")[1].split(":")[0]: line for line in skipped}
    expected = {
        "4": "not JSON",
        "5": "expected an object",
        "6": "cannot be decoded",
        "7": "no such file",
        "8": "outside the folder",
        "9": "outside the folder",
        "10": "neither text nor image",
        "11": "text is 3, expected a string",
        "12": "longer than the context",
        "13": "half a surrogate pair",
        "14": "not UTF-8",
    }
    assert set(reasons) == set(expected)
    for line, reason in expected.items():
        assert reason in reasons[line]


def test_a_folder_is_one_embedding_a_picture(embed, tmp_path: Path):
    folder, out = tmp_path / "photos", tmp_path / "a.parquet"
    picture(folder / "b.PNG", 2, 2)
    picture(folder / "a" / "x.jpg", 7, 3)
    (folder / "README.md").write_text("not a picture, and not broken either")
    (folder / "broken.png").write_bytes(b"")
    code, _, skipped = embed(folder, out)
    table = pq.read_table(out)
    assert code == 0
    assert table.column_names == ["id", "path", "embedding"]
    assert table["id"].to_pylist() == ["a/x.jpg", "b.PNG"]
    assert table["embedding"].to_pylist() == [[0, 7, 3], [0, 2, 2]]
    broken = folder / "broken.png"
    assert skipped == [f"skipped {broken}: not a picture in a format that Pillow reads"]


def test_blocks_bound_memory_and_change_nothing(embed, tmp_path: Path, monkeypatch):
    folder = tmp_path / "photos"
    for i in range(7):
        picture(folder / f"{i}.png", 10, i + 1)
    embed(folder, tmp_path / "whole.parquet")
    monkeypatch.setattr(cafe.cli.inputs, "MAX_BLOCK_PIXELS", 60)
    assert [len(block) for block, _ in open_source(folder).blocks()] == [3, 2, 1, 1]
    embed(folder, tmp_path / "pieces.parquet")
    monkeypatch.setattr(cafe.cli.inputs, "MAX_BLOCK_INPUTS", 2)
    assert [len(block) for block, _ in open_source(folder).blocks()] == [2, 2, 2, 1]
    whole = pq.read_table(tmp_path / "whole.parquet")
    assert whole.num_rows == 7
    assert pq.read_table(tmp_path / "pieces.parquet").equals(whole)


@pytest.mark.parametrize("name", ["a.csv", "gone.txt", "empty"])
def test_a_source_of_no_known_kind_is_one_error(embed, tmp_path: Path, name: str):
    (tmp_path / "a.csv").touch()
    (tmp_path / "empty").mkdir()
    code, _, err = embed(tmp_path / name, tmp_path / "out.parquet")
    assert code == 2
    assert len(err) == 1
    assert err[0].startswith(f"error: {tmp_path / name}: ")


def test_an_old_result_survives_a_run_without_any_usable_input(embed, tmp_path: Path):
    source, out = tmp_path / "a.txt", tmp_path / "a.parquet"
    source.write_text("red\n")
    embed(source, out)
    before = out.read_bytes()
    source.write_text("\n")
    code, _, err = embed(source, out)
    assert code == 2
    assert err[-1] == f"error: {source}: nothing to embed (1 inputs skipped)"
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "a.txt"]


def test_an_impossible_output_is_told_before_the_work(embed, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cafe.model.vlm", None)  # importing it would fail
    source = tmp_path / "a.txt"
    source.write_text("red\n")
    code, _, err = embed(source, source / "out.parquet")
    assert code == 2
    assert "cannot be written" in err[0]
    code, _, err = embed(source, tmp_path)
    assert err == [f"error: {tmp_path}: is a folder; name a file"]
