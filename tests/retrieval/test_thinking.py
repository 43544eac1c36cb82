"""`write_thoughts`: a model describes the images of a training file, and can be interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from cafe.data.scenes import write_scenes
from cafe.data.thoughts import ThoughtKey, Thoughts, read_thoughts, thought_line
from cafe.errors import DataError
from cafe.recipes import load_source
from cafe.retrieval import thinking
from cafe.retrieval.thinking import write_thoughts


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    folder = tmp_path / "scenes"
    write_scenes(folder, 5, 0)
    return folder


class Writer:
    """Says the name of each image's file; nothing of the third one. Counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def write_captions(
        self, inputs: Any, *, max_new_tokens: int, batch_size: int
    ) -> list[str | None]:
        names = [Path(str(side[0].content[0].source)).name for side in inputs]
        self.asked += names
        return [None if name == "000002.png" else f"it is {name}" for name in names]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_image_is_described_once(scenes: Path, tmp_path: Path) -> None:
    writer, out = Writer(), tmp_path / "new" / "thoughts.jsonl"
    report = write_thoughts(writer, scenes / "captions.json", out=out)  # type: ignore[arg-type]
    assert (report.written, report.known, report.without, report.skipped) == (4, 0, 1, [])
    assert lines(out)[1] == {
        "id": "000001",
        "image": "000001.png",
        "query": "it is 000001.png",
        "target": None,
        "model": None,
    }
    assert read_thoughts(out)[ThoughtKey("000002", "000002.png")].query is None
    again = write_thoughts(writer, scenes / "captions.json", out=out)  # type: ignore[arg-type]
    assert (again.written, again.known) == (0, 5)
    assert len(writer.asked) == 5, "nothing is asked twice, nor what the model says nothing of"
    assert [p.name for p in out.parent.iterdir()] == ["thoughts.jsonl"], "no lock is left"


def test_an_interrupted_run_goes_on(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thinking, "BLOCK", 2)
    out, writer = tmp_path / "t.jsonl", Writer()
    source = scenes / "captions.json"
    whole = tmp_path / "whole.jsonl"
    write_thoughts(Writer(), source, out=whole)  # type: ignore[arg-type]

    class Dies(Writer):
        def write_captions(self, inputs: Any, **options: Any) -> list[str | None]:
            if len(self.asked) == 4:
                raise KeyboardInterrupt
            return super().write_captions(inputs, **options)

    with pytest.raises(KeyboardInterrupt):
        write_thoughts(Dies(), source, out=out)  # type: ignore[arg-type]
    assert len(lines(out)) == 4
    with out.open("a") as file:
        file.write('{"id": "0000')  # as a killed process leaves it
    report = write_thoughts(writer, source, out=out)  # type: ignore[arg-type]
    assert (report.written, report.known, writer.asked) == (1, 4, ["000004.png"])
    assert out.read_text() == whole.read_text()


def test_a_broken_image_is_skipped_and_counted(scenes: Path, tmp_path: Path) -> None:
    class Refuses(Writer):
        def write_captions(self, inputs: Any, **options: Any) -> list[str | None]:
            if any("000003" in str(side[0].content[0].source) for side in inputs):
                raise DataError("image: cannot be decoded")
            return super().write_captions(inputs, **options)

    said: list[str] = []
    report = write_thoughts(
        Refuses(),  # type: ignore[arg-type]
        load_source(str(scenes / "captions.json"), ["limit=4"]),
        out=tmp_path / "t.jsonl",
        on_skipped=said.append,
    )
    assert said == report.skipped == ["example '000003': image: cannot be decoded"]
    assert (report.written, report.without) == (2, 1)
    assert [line["id"] for line in lines(tmp_path / "t.jsonl")] == ["000000", "000001", "000002"]


def test_two_writers_of_one_file(scenes: Path, tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".t.jsonl.writer"),
        pytest.raises(DataError, match=r"t\.jsonl: another process is writing it"),
    ):
        write_thoughts(Writer(), scenes / "captions.json", out=tmp_path / "t.jsonl")  # type: ignore[arg-type]


def test_data_without_images(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"anchor": "a", "positive": "b"}\n')
    with pytest.raises(DataError, match="none of its 1 examples has an image without words"):
        write_thoughts(Writer(), path, out=tmp_path / "t.jsonl")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_command_writes_what_a_recipe_reads(
    scenes: Path, tmp_path: Path, command_line: Any
) -> None:
    """`cafe think`, then a training with thoughts, and its result says how to embed."""
    out = tmp_path / "thoughts.jsonl"
    data = scenes / "captions.json"
    code, printed, _ = command_line("think", "tiny", data, "--out", out)
    assert (code, printed) == (0, f"5 thoughts written to {out}\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: tiny\noutput_dir: {tmp_path / 'run'}\n"
        f"data: [{{path: {data}, thoughts: thoughts.jsonl}}]\n"
        "objective: {thought_weight: 0.5, match_weight: 0.5}\n"
        "batch: {examples: 4, workers: 0}\noptimizer: {learning_rate: 1e-4}\n"
        "schedule: {steps: 2}\n"
    )
    code, _, said = command_line("train", recipe)
    assert code == 0, said
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(record["thought"] > 0 and record["match"] > 0 for record in log)


def test_thoughts_of_another_model_are_not_mixed_with_new_ones(
    scenes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "t.jsonl"
    out.write_text(thought_line(ThoughtKey("000001", "000001.png"), Thoughts("x", model="other")))
    with pytest.raises(DataError, match=r"t\.jsonl: was written by other, not by tiny"):
        write_thoughts("tiny", scenes / "captions.json", out=out)


def test_examples_that_nothing_tells_apart(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    record = {"id": "a", "image": {"bytes": None, "path": None}, "caption": "x"}
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError):
        write_thoughts(Writer(), path, out=tmp_path / "t.jsonl")  # type: ignore[arg-type]
