"""`cafe data inspect`: what is shown is what the collator makes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
from rich.console import Console

import cafe.model.vlm
from cafe.cli.data import half_blocks, preview
from cafe.data.read import read_examples
from cafe.data.records import ReadOptions
from cafe.model.rows.inspect import row_tokens, sequence_views
from cafe.types import Example
from helpers import layouts
from helpers.layouts import TEXTS, image_bytes


@pytest.fixture
def inspect(small_model: Any, monkeypatch: pytest.MonkeyPatch, command_line: Any) -> Any:
    """Runs `cafe data inspect`: (exit code, stdout, stderr)."""
    monkeypatch.setattr(cafe.model.vlm.CAFe, "from_pretrained", lambda name: small_model)
    return lambda *arguments: command_line("data", "inspect", *arguments)


def test_it_shows_format_counts_rejected_and_prompts(inspect: Any, tmp_path: Path) -> None:
    path = layouts.llava(tmp_path / "data")
    records = json.loads(path.read_text())
    records[1]["image"] = "images/9.png"
    path.write_text(json.dumps(records))
    code, out, _ = inspect(path, "--count", 1, "--png", tmp_path / "png")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == f"{path}: format llava, 3 examples, 1 records skipped"
    assert "record 2, id 'llava-1': image 'images/9.png': no such file" in lines[1]
    assert "example 'llava-0'" in lines
    assert f"  image 40x30, {tmp_path}/png/1-1.png" in lines
    assert PIL.Image.open(tmp_path / "png/1-1.png").getpixel((0, 0)) == (255, 0, 0)
    assert "<|im_start|>user" in out
    assert f"{TEXTS[0]}<|im_end|>" in out
    assert "example 'llava-2'" not in out


def test_token_counts_are_those_of_the_collator(small_model: Any, tmp_path: Path) -> None:
    path = layouts.llava(tmp_path / "data")
    example = read_examples(path).examples[0]
    collator = small_model.collator
    query, target, answer = sequence_views(collator, example)
    assert [v.name for v in (query, target, answer)] == ["query", "target", "answer"]
    images = collator.embedding_rows([example.query])[0].input_ids
    placeholder = collator.family.placeholder_id(collator.processor)
    assert query.image_tokens == int((images == placeholder).sum()) > 30
    assert query.image_tokens + query.text_tokens == images.numel()
    assert (target.image_tokens, target.labelled_tokens, query.labelled_tokens) == (0, 0, 0)
    assert answer.labelled_tokens == collator([example]).label_count
    learned = "".join(run.text for run in answer.runs if run.labelled)
    assert learned == f"{TEXTS[0]}<|im_end|>"
    whole = sum(v.image_tokens + v.text_tokens for v in (query, target, answer))
    assert row_tokens(collator, example) < whole - query.image_tokens


def test_keys_of_a_source_are_read_and_checked(inspect: Any, tmp_path: Path) -> None:
    path = layouts.column_map(tmp_path / "data")
    code, out, _ = inspect(path, "columns={image: photo, text: title}", "mode=chat", "limit=2")
    assert code == 0
    assert "format captions, 2 examples" in out
    assert "  query" not in out
    assert "  answer: " in out
    code, _, err = inspect(path)
    assert code == 2
    assert "the columns (photo, title, year) fit no format" in err
    code, _, err = inspect(path, "colums=x")
    assert code == 2
    assert "did you mean data.0.columns" in err


def test_an_example_that_cannot_be_collated_is_told_and_the_next_is_shown(
    inspect: Any, tmp_path: Path
) -> None:
    path = layouts.llava(tmp_path / "data")
    (tmp_path / "data/images/0.png").write_bytes(image_bytes(0)[:50])
    code, out, _ = inspect(path)
    assert code == 0
    assert "  cannot be used: " in out
    assert "0.png" in out
    assert "example 'llava-1'" in out


def test_a_terminal_shows_images_in_half_blocks(small_model: Any, tmp_path: Path) -> None:
    image = PIL.Image.new("RGB", (40, 40), "red")
    image.paste("blue", (0, 20, 40, 40))
    text = half_blocks(image, 4)
    assert str(text) == "▀▀▀▀\n▀▀▀▀"
    styles = {str(span.style) for span in text.spans}
    assert styles == {"#ff0000 on #ff0000", "#0000ff on #0000ff"}
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="truecolor", width=80)
    example: Example = read_examples(layouts.swift(tmp_path / "data")).examples[0]
    preview(console, small_model.collator, example)
    assert "38;2;255;0;0;48;2;255;0;0m▀" in stream.getvalue()
    assert stream.getvalue().count("negative: ") == 2


def test_a_video_is_shown_by_the_frames_that_the_model_sees(inspect: Any, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(20):
            pixels = np.full((48, 64, 3), 12 * level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    turns = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": TEXTS[0]}]
    record = {"video": "film.mp4", "conversations": turns}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    code, out, _ = inspect(tmp_path / "data.json", "--png", tmp_path / "png")
    assert code == 0
    shown = [line for line in out.splitlines() if line.startswith("  frame ")]
    assert len(shown) == len(list((tmp_path / "png").iterdir())) == 16
    assert shown[0] == f"  frame 1 of 20 64x48, {tmp_path}/png/1-1.png"
    assert re.search(r"  query: \d{2,} image tokens", out)
    assert "<video> x " in out


def test_stored_images_are_shown_as_any_other(inspect: Any, tmp_path: Path) -> None:
    code, out, _ = inspect(layouts.webdataset(tmp_path / "data"))
    assert code == 0
    assert out.count("  image 40x30") == 3
    records = read_examples(layouts.mmeb(tmp_path / "mmeb"), ReadOptions(language_loss=False))
    assert len(records.examples) == 4


@pytest.mark.parametrize("compat", ["none", "official"])
def test_a_recipe_shows_what_it_trains(inspect: Any, tmp_path: Path, compat: str) -> None:
    data = layouts.llava(tmp_path / "data")
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: tiny\noutput_dir: out\nbatch: {examples: 2}\nschedule: {steps: 1}\n"
        "optimizer: {learning_rate: 1e-3}\n"
        f"data: [{{path: data/{data.name}}}]\n"
    )
    code, out, _ = inspect(path, f"objective.compat={compat}", "--count", 1)
    assert code == 0
    system = "<|im_start|>system\n    You are a helpful assistant.<|im_end|>"
    assert (system in out) == (compat == "official")
    beside = f"{TEXTS[0]}Compress this sentence in one word:"
    assert (beside in out) == (compat == "official")
    code, out, _ = inspect(path, f"objective.compat={compat}", "objective.language_weight=0")
    assert code == 0
    assert "  answer: " not in out
    assert "  query: " in out


def test_a_wrong_key_of_a_recipe_and_a_mixture_are_told_apart(inspect: Any, tmp_path: Path) -> None:
    data = layouts.llava(tmp_path / "data")
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(f"datasets:\n  - json_path: {data}\n")
    code, out, _ = inspect(mixture, "--count", 1)
    assert code == 0
    assert "example 'llava-0'" in out
    recipe = tmp_path / "run.yaml"
    recipe.write_text("model: tiny\ndata: []\nobjectiv: {}\n")
    code, _, err = inspect(recipe)
    assert code == 2
    assert "objective" in err
