"""`embed_dataset`: every usable input is embedded, every broken one is named, nothing is lost."""

from __future__ import annotations

import doctest
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from cafe.errors import DataError
from cafe.retrieval import embed as embed_module
from cafe.retrieval.blocks import BlockLimits, loaded_blocks
from cafe.retrieval.embed import embed_dataset
from cafe.retrieval.shards import EmbedReport
from cafe.retrieval.sources import open_source


def sizes(inputs: Any) -> np.ndarray:
    """Embeds an input as (length of its text, width, height of its image)."""
    return np.array([_size(value) for value in inputs], dtype=np.float32)


def _size(value: Any) -> tuple[int, int, int]:
    text = value if isinstance(value, str) else value["text"] if isinstance(value, dict) else ""
    image = value["image"] if isinstance(value, dict) else value
    if text == "too long":
        raise DataError("longer than the context")
    return (len(text), *(image.size if isinstance(image, PIL.Image.Image) else (0, 0)))


def no_model(name: str) -> Any:
    raise AssertionError(f"{name} was loaded")


embed = partial(embed_dataset, "tiny", encode=sizes, load=no_model)


def lines_of(report: EmbedReport) -> list[str]:
    return [f"skipped {record.location}: {record.reason}" for record in report.skipped]


def image(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    PIL.Image.new("RGB", (width, height)).save(path)


def test_a_text_file_is_one_embedding_a_line(tmp_path: Path):
    source, out = tmp_path / "a.txt", tmp_path / "deep" / "a.parquet"
    source.write_bytes("\ufeffred\r\n\r\nmug ü\nlast".encode())
    lines: list[str] = []
    report = embed(source, out, on_skipped=lines.append)
    table = pq.read_table(out)
    assert (report.embedded, report.uri, report.paths) == (3, str(out), [out])
    assert [f"skipped {line}" for line in lines] == lines_of(report)
    assert lines_of(report) == [f"skipped {source}, line 2: an empty line"]
    assert table.column_names == ["id", "text", "embedding"]
    assert table["id"].to_pylist() == ["1", "3", "4"]
    assert table["text"].to_pylist() == ["red", "mug ü", "last"]
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[3]"
    assert [row[0] for row in table["embedding"].to_pylist()] == [3, 5, 4]
    assert table.schema.metadata[b"cafe.model"] == b"tiny"
    assert [path.name for path in out.parent.iterdir()] == ["a.parquet"]


def test_a_json_file_mixes_texts_and_images_and_names_every_broken_line(tmp_path: Path):
    image(tmp_path / "sub" / "mug.png", 5, 4)
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 not an image")
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
    report = embed(source, out)
    skipped = lines_of(report)
    table = pq.read_table(out)
    assert (report.embedded, len(report.skipped)) == (3, 11)
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
        "13": "unpaired surrogate",
        "14": "not UTF-8",
    }
    assert set(reasons) == set(expected)
    for line, reason in expected.items():
        assert reason in reasons[line]


def test_a_folder_is_one_embedding_a_image(tmp_path: Path):
    folder, out = tmp_path / "photos", tmp_path / "a.parquet"
    image(folder / "b.PNG", 2, 2)
    image(folder / "a" / "x.jpg", 7, 3)
    (folder / "README.md").write_text("not an image, and not broken either")
    (folder / "broken.png").write_bytes(b"")
    skipped = lines_of(embed(folder, out))
    table = pq.read_table(out)
    assert table.column_names == ["id", "path", "embedding"]
    assert table["id"].to_pylist() == ["a/x.jpg", "b.PNG"]
    assert table["embedding"].to_pylist() == [[0, 7, 3], [0, 2, 2]]
    broken = folder / "broken.png"
    assert skipped == [f"skipped {broken}: not an image in a format that Pillow reads"]


def test_blocks_bound_memory_and_change_nothing(tmp_path: Path):
    folder = tmp_path / "photos"
    for i in range(7):
        image(folder / f"{i}.png", 10, i + 1)
    embed(folder, tmp_path / "whole.parquet")
    records = open_source(folder).records
    for limits, expected in (
        (BlockLimits(pixels=60), [3, 2, 1, 1]),
        (BlockLimits(inputs=2, pixels=60), [2, 2, 2, 1]),
    ):
        assert [len(block) for block, _ in loaded_blocks(records(), limits)] == expected
        embed(folder, tmp_path / "pieces.parquet", limits=limits)
        pieces = pq.read_table(tmp_path / "pieces.parquet")
        assert pieces.equals(pq.read_table(tmp_path / "whole.parquet"))
    whole = pq.read_table(tmp_path / "whole.parquet")
    assert whole.num_rows == 7


@pytest.mark.parametrize("name", ["a.csv", "gone.txt", "gone.csv", "gone/a.jsonl", "empty"])
def test_a_source_without_records_is_one_error(tmp_path: Path, name: str):
    (tmp_path / "a.csv").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as failure:
        embed(tmp_path / name, tmp_path / "out.parquet")
    assert str(failure.value).startswith(f"{tmp_path / name}: ")
    assert len(str(failure.value).splitlines()) == 1


def test_an_old_result_survives_a_run_without_any_usable_input(tmp_path: Path):
    source, out = tmp_path / "a.txt", tmp_path / "a.parquet"
    source.write_text("red\n")
    embed(source, out)
    before = out.read_bytes()
    source.write_text("\n")
    with pytest.raises(DataError) as failure:
        embed(source, out)
    assert str(failure.value) == f"{source}: nothing to embed (1 inputs skipped)"
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "a.txt"]


def test_an_impossible_output_is_reported_before_the_model_loads(tmp_path: Path):
    source = tmp_path / "a.txt"
    source.write_text("red\n")
    for out, message in (
        (source / "out.parquet", "cannot be written"),
        (tmp_path, f"{tmp_path}: is a folder; name a file"),
    ):
        with pytest.raises(DataError) as failure:
            embed_dataset("tiny", source, out, load=no_model)
        assert message in str(failure.value)


def test_without_a_destination_the_embeddings_come_back(tmp_path: Path, caplog: Any):
    source = tmp_path / "a.txt"
    source.write_text("red\n\nmug ü\n")
    report = embed(source)
    assert report.ids == ["1", "3"]
    assert report.embeddings is not None
    assert report.embeddings.tolist() == [[3, 0, 0], [5, 0, 0]]
    assert (report.uri, report.paths, report.shards) == (None, [], None)
    assert caplog.messages == [f"skipped {source}, line 2: an empty line"]


def test_a_loaded_model_embeds_and_its_file_names_it(
    small_model: Any, small_dir: Path, tmp_path: Path
):
    source, out = tmp_path / "a.txt", tmp_path / "a.parquet"
    source.write_text("red\na longer text\n")
    report = embed_dataset(small_model, source)
    np.testing.assert_allclose(
        report.embeddings, small_model.encode(["red", "a longer text"]), atol=1e-6
    )
    embed_dataset(small_dir, source, out)
    assert pq.read_schema(out).metadata[b"cafe.model"] == str(small_dir).encode()
    embed_dataset(type(small_model).from_pretrained(small_dir), source, out)
    assert pq.read_schema(out).metadata[b"cafe.model"] == str(small_dir).encode()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"out": "a.parquet", "to": "b"}, "name one of them"),
        ({"shard_size": 2}, "name where to write"),
        ({"to": "b", "engine": "ray"}, "each worker loads the model by its name"),
    ],
)
def test_options_that_contradict_each_other_are_an_error(
    tmp_path: Path, options: dict[str, Any], reason: str
):
    with pytest.raises(DataError) as failure:
        embed(tmp_path / "gone.txt", **options)
    assert reason in str(failure.value)


def test_the_example_of_the_docstring_shows_what_happens(tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("a red mug\n\na blue mug\n")
    (example,) = [
        test
        for test in doctest.DocTestFinder().find(embed_dataset, globs=vars(embed_module).copy())
        if test.examples
    ]
    assert doctest.DocTestRunner().run(example).failed == 0
