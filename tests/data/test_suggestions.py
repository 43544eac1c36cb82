"""What is said of records that fit no format: what they hold, and the column map to try."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cafe.data.read import read_examples
from cafe.data.records import ReadOptions
from cafe.data.suggestions import suggestion
from cafe.errors import DataError
from helpers import layouts

TURNS = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]
CASES: dict[str, tuple[list[dict[str, Any]], str | None]] = {
    "image and text": (
        [{"photo": "a.jpg", "year": 3, "title": "A red mug."}],
        "captions: try columns: {image: photo, caption: title}",
    ),
    "the text that is named like one": (
        [{"Image": "a.jpg", "license": "a very long text of no use here", "Caption": "A mug."}],
        "captions: try columns: {image: Image, caption: Caption}",
    ),
    "the longest text where no name helps": (
        [{"a": "x.png", "b": "two words", "c": "a sentence of six words here"}],
        "captions: try columns: {image: a, caption: c}",
    ),
    "labels": (
        [{"img": {"bytes": b"x", "path": None}, "class": "cat"}],
        "captions: try columns: {image: img, caption: class}",
    ),
    "two texts": (
        [{"body": "They live in the sea.", "question": "Where do crabs live?"}],
        "pairs: try columns: {anchor: question, positive: body}",
    ),
    "two images": (
        [{"left": "a.jpg", "right": "b.jpg"}],
        "pairs: try columns: {anchor: left, positive: right}",
    ),
    "turns": (
        [{"dialog": TURNS, "img": "a.jpg"}],
        "llava: try columns: {conversations: dialog, image: img}",
    ),
    "chat": (
        [{"chat": [{"role": "user", "content": "Hi."}]}],
        "messages: try columns: {messages: chat}",
    ),
    "numbers": ([{"x": 1, "y": [2.0]}], None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_nearest_format_by_hand(case: str) -> None:
    records, expected = CASES[case]
    said = suggestion(records)
    assert said is not None
    if expected is None:
        assert said.endswith("x (other values), y (other values), which is like no format")
    else:
        assert said.endswith(f"The nearest format is {expected}")


def test_no_records_suggest_nothing() -> None:
    assert suggestion([]) is None


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_the_error_of_every_reader_has_it_and_the_map_works(tmp_path: Path, suffix: str) -> None:
    layouts.write_images(tmp_path)
    path = tmp_path / f"data.{suffix}"
    records = [{"photo": f"images/{n}.png", "title": layouts.TEXTS[n]} for n in range(4)]
    if suffix == "csv":
        lines = ["photo,title", *(f'{r["photo"]},"{r["title"]}"' for r in records)]
        path.write_text("\n".join(lines))
    else:
        layouts.write_json(path, records)
    with pytest.raises(DataError, match=r"photo \(images\), title \(texts\)") as raised:
        read_examples(path)
    assert "{image: photo, caption: title}" in str(raised.value)
    columns = {"image": "photo", "caption": "title"}
    assert len(read_examples(path, ReadOptions(columns=columns)).examples) == 4


def test_a_recipe_and_inspect_say_it_too(tmp_path: Path, command_line: Any) -> None:
    layouts.write_images(tmp_path)
    record = {"photo": "images/0.png", "title": "A red mug."}
    (tmp_path / "d.json").write_text(json.dumps([record]))
    (tmp_path / "r.yaml").write_text(
        "{model: tiny, output_dir: o, data: [{path: d.json}], batch: {examples: 1}, "
        "optimizer: {learning_rate: 1.0}, schedule: {steps: 1}}"
    )
    for name in ("d.json", "r.yaml"):
        code, _, err = command_line("data", "inspect", tmp_path / name)
        assert (code, "{image: photo, caption: title}" in err) == (2, True), err
