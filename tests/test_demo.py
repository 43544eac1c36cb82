"""The demo from end to end, with a small random model: its files, numbers and printed texts."""

from __future__ import annotations

import io
import json
import shlex
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from rich.console import Console

from cafe.demo.measure import SCORES, SceneScores, mended_search
from cafe.demo.run import DemoSettings, Forecast, example_search, run_demo
from cafe.errors import DataError
from cafe.evaluation.datasets.captioned import CaptionedImage
from cafe.model.vlm import CAFe
from cafe.precision import resolved_precision
from cafe.recipes import load_recipe
from cafe.training.build import training_device
from cafe.training.log import StepRecord
from cafe.types import Image


@pytest.fixture(scope="module")
def demo(small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished demo, in a folder with a space in its name, and what it printed."""
    out = tmp_path_factory.mktemp("a folder") / "demo"
    printed = io.StringIO()
    settings = DemoSettings(
        train_scenes=24,
        train_questions=2,
        test_scenes=6,
        overrides=(f"model={small_dir}", "batch.examples=8", "batch.chunk=4", "batch.workers=0"),
    )
    run_demo(out, 2, 5, settings=settings, console=Console(file=printed, width=100))
    return out, printed.getvalue()


@pytest.fixture(scope="module")
def results(demo: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((demo[0] / "results.json").read_text())


def test_results_hold_every_score_before_and_after(results):
    for when in ("before", "after"):
        assert tuple(results[when]) == SCORES
        assert all(isinstance(value, float) for value in results[when].values())
        assert set(results["question_accuracy"][when]) >= {"presence", "object"}
    assert results["before"]["caption_loss"] > results["after"]["caption_loss"]  # it was trained
    assert results["seconds"] == pytest.approx(sum(results["stages_seconds"].values()), abs=0.1)
    assert (results["settings"]["steps"], results["settings"]["seed"]) == (2, 5)
    assert results["settings"]["precision"] == resolved_precision("auto", training_device())


def test_the_second_table_is_that_of_images_with_captions(demo, results):
    out, printed = demo
    names = tuple(results["after_with_captions"])
    assert names == (*SCORES[:4], "modality_gap")
    model = CAFe.from_pretrained(out / "model")
    paths = sorted((out / "test" / "images").iterdir())
    captions = [one["conversations"][1]["value"] for one in read_json(out / "test/captions.json")]
    images = model.encode(paths, caption=True)
    texts = model.encode(captions)
    gap = np.linalg.norm(images.mean(0) - texts.mean(0))
    assert results["after_with_captions"]["modality_gap"] == pytest.approx(gap, abs=1e-3)
    assert "with its caption" in printed


def test_after_a_few_steps_the_demo_says_how_long_it_will_take():
    printed = io.StringIO()
    forecast = Forecast(Console(file=printed, width=100), steps=100, evaluation=60.0)
    for step, seconds in enumerate((9.0, 2.0, 3.0, 2.5, 2.5), 1):
        forecast(record(step, seconds))
    # 96 steps of the median 2.5 s, and the evaluation: 300 s
    assert " ".join(printed.getvalue().split()).startswith("2.5 s a step: about 5 min to the end")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def record(step: int, seconds: float) -> StepRecord:
    return StepRecord(step, 1.0, 1.0, 1.0, 1.0, 1e-4, 1.0, 1.0, 0.0, seconds)


def test_the_run_is_the_recipe_of_the_package_on_the_written_scenes(demo):
    out, _ = demo
    recipe = load_recipe(out / "recipe.yaml")
    assert [Path(source.path) for source in recipe.data] == [
        out / "train" / "captions.json",
        out / "train" / "questions.json",
    ]
    assert recipe.merge_by_image
    with as_file(files("cafe.recipes") / "demo.yaml") as shipped:
        assert recipe.objective == load_recipe(shipped).objective
    assert min(recipe.objective.contrastive_weight, recipe.objective.language_weight) > 0
    assert recipe.precision == "auto"
    assert len((out / "log.jsonl").read_text().splitlines()) == 2
    assert len(json.loads((out / "train" / "captions.json").read_text())) == 24
    assert len(json.loads((out / "test" / "captions.json").read_text())) == 6


def test_the_model_and_the_image_can_be_used(demo):
    out, _ = demo
    assert CAFe.from_pretrained(out / "model").encode("a red cat").shape == (64,)
    with PIL.Image.open(out / "demo.png") as image:
        image.load()


def test_it_prints_the_table_and_three_commands_whose_paths_exist(demo):
    out, printed = demo
    for name in SCORES:
        assert name.replace("_", " ") in printed
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("  cafe ")]
    assert [command[1] for command in commands] == ["generate", "embed", "evaluate"]
    for command in commands:
        paths = [Path(word) for word in command if word.startswith(str(out))]
        written = [path for path in paths if path.suffix == ".parquet"]
        assert len(paths) >= 2
        assert all(path.exists() for path in paths if path not in written)
        assert all(path.parent.exists() for path in written)


def test_the_search_shows_the_nearest_images_and_the_rank_of_the_correct_one():
    def made(kinds: str) -> CaptionedImage:
        image = Image(PIL.Image.new("RGB", (8, 8)))
        return CaptionedImage(kinds, image, (kinds,), (), kinds=frozenset(kinds.split()))

    scenes = tuple(made(k) for k in ("cat", "cat bus key", "cat bus egg", "b", "c", "d", "e"))
    # The caption of scene 1, the first with three classes, is nearest to image 3, then to 1.
    cosines = np.array([0.1, 0.8, 0.2, 0.9, 0.3, 0.4, 0.5])
    images = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)
    captions = np.tile([1.0, 0.0], (7, 1))

    search = example_search(scenes, SceneScores({}, {}, images, captions))

    assert (search.text, search.rank, search.candidates) == ("cat bus key", 2, 7)
    assert [round(hit.score, 6) for hit in search.hits] == [0.9, 0.8, 0.5, 0.4, 0.3]
    assert [hit.correct for hit in search.hits] == [False, True, False, False, False]


def test_the_search_that_captions_mend_is_the_one_that_was_most_wrong():
    def turned(*degrees: float) -> np.ndarray:
        angles = np.radians(degrees)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    texts = turned(0, 20, 40, 60)
    alone = turned(40, 20, 60, 0)  # ranks of the own image: 3, 1, 2, 4
    assert mended_search(alone, texts, texts) == 3
    assert mended_search(alone, turned(0, 20, 40, 5), texts) == 0, "3 is not right afterwards"
    assert mended_search(texts, texts, texts) is None, "nothing was wrong"
    assert mended_search(alone, alone, texts) is None, "nothing was mended"


def test_it_says_whether_captions_mend_a_search(demo, results):
    mended, printed = results["mended_search"], demo[1]
    if mended is None:
        assert "No search was found that" in printed
    else:
        assert f"ranked {mended['rank_alone']} alone" in " ".join(printed.split())


def test_a_folder_in_use_is_left_alone(demo):
    out, _ = demo
    before = sorted(out.iterdir())
    with pytest.raises(DataError, match="is not an empty folder"):
        run_demo(out, 1, 0)
    assert sorted(out.iterdir()) == before
