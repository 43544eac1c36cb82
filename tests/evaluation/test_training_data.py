"""What trains evaluates: sources of training as the images and captions of a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from cafe.errors import DataError, RecipeError
from cafe.evaluation.datasets.captioned import CaptionedImage
from cafe.evaluation.registry import images
from cafe.evaluation.run import evaluate
from cafe.evaluation.task import TaskSetup
from cafe.recipes import load_source
from helpers import layouts

NO_CALLS: Any = None


def shown(data: Any, *keys: str, limit: int | None = None) -> list[CaptionedImage]:
    source = load_source(data, keys) if keys or isinstance(data, dict) else data
    return list(images(TaskSetup(NO_CALLS, source, limit)))


def captions(found: list[CaptionedImage]) -> list[tuple[str, ...]]:
    return [image.captions for image in found]


@pytest.mark.parametrize(
    "layout",
    [
        "llava",
        "trl",
        "image_folder",
        "image_folder_csv",
        "webdataset",
        "saved_to_disk",
        "caption_lines",
        "coco_captions",
        "text_beside",
    ],
)
def test_data_of_training_is_images_with_their_captions(tmp_path: Path, layout: str) -> None:
    path = layouts.LAYOUTS[layout][0](tmp_path / "data")
    assert captions(shown(path)) == [(text,) for text in layouts.TEXTS]
    assert len(shown(path, limit=2)) == 2


def write(folder: Path, name: str, text: str) -> Path:
    for image in "ab":
        (folder / "elsewhere").mkdir(exist_ok=True)
        PIL.Image.new("RGB", (8, 8), "red").save(folder / "elsewhere" / f"{image}.png")
    (folder / name).write_text(text)
    return folder / name


def test_captions_of_one_image_come_together_wherever_they_stand(tmp_path: Path) -> None:
    text = "photo,title\na.png,one\nb.png,two\na.png,three\n"
    path = write(tmp_path, "c.csv", text)
    keys = ["columns={image: photo, text: title}", f"image_root={tmp_path / 'elsewhere'}"]
    assert captions(shown(str(path), *keys)) == [("one", "three"), ("two",)]


def test_a_pair_of_an_image_and_a_text_counts_whichever_is_the_query(tmp_path: Path) -> None:
    records = [{"query": "a mug", "pos": ["elsewhere/a.png"]}, {"query": "b", "pos": "x"}]
    path = write(tmp_path, "p.json", json.dumps(records[:1]))
    assert captions(shown(str(path))) == [("a mug",)]
    path.write_text(json.dumps(records))
    with pytest.raises(
        DataError, match=r"1 records cannot be used.*not a pair of an image and a text"
    ):
        shown(str(path))


def test_of_several_splits_test_is_read_unless_one_is_named(tmp_path: Path) -> None:
    entries = [
        {"filename": f"{name}.png", "split": split, "sentences": [{"raw": f"{name} {split}"}]}
        for name, split in (("a", "train"), ("b", "test"))
    ]
    path = write(tmp_path, "dataset_flickr30k.json", json.dumps({"images": entries}))
    root = f"image_root={tmp_path / 'elsewhere'}"
    assert captions(shown(str(path), root)) == [("b test",)]
    assert captions(shown(str(path), root, "split=train")) == [("a train",)]
    path.write_text(json.dumps({"images": entries[:1]}))
    assert captions(shown(str(path), root)) == [("a train",)]


def test_keys_that_retrieval_cannot_follow_are_errors(tmp_path: Path, small_model: Any) -> None:
    path = str(write(tmp_path, "c.txt", "elsewhere/a.png\tone\nelsewhere/b.png\ttwo\n"))
    with pytest.raises(DataError, match="mode chat gives no pairs"):
        shown(path, "mode=chat")
    with pytest.raises(DataError, match="embedding_prompt none"):
        shown(path, "embedding_prompt=none")
    with pytest.raises(DataError, match=r"reads its own layout.*\(split\)"):
        evaluate(small_model, "vqa", data={"path": path, "split": "x"})
    with pytest.raises(DataError, match="for a task, not for a suite"):
        evaluate(small_model, suite="quick", data={"path": path})
    with pytest.raises(RecipeError, match=r"unknown recipe key data.0.image_rot"):
        evaluate(small_model, "retrieval", data={"path": path, "image_rot": "x"})


def test_the_command_takes_the_keys_of_a_source(
    tmp_path: Path, small_dir: Path, command_line: Any
) -> None:
    path = write(tmp_path, "c.txt", "a.png\tone\nb.png\ttwo\na.png\tthree\n")
    root = tmp_path / "elsewhere"
    words = ["evaluate", small_dir, f"image_root={root}", "--task", "retrieval", "--data", path]
    code, out, err = command_line(*words, "--json", tmp_path / "results")
    assert (code, "retrieval  2 samples" in out) == (0, True), err
    record = json.loads((tmp_path / "results" / "retrieval.json").read_text())
    assert record["settings"]["data"] == f"{path} image_root={root}"
    code, _, err = command_line("evaluate", small_dir, "split=x", "--task", "retrieval")
    assert (code, err) == (2, "error: split=x: keys are those of --data; name it\n")
