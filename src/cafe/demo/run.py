"""`cafe demo`: a small real model learns to retrieve and still answers, in minutes.

out/
  train/  test/    the scenes: images, captions, questions, truth
  model/           the fine-tuned model (`output_dir` of the run is `out`)
  results.json     {"before": {…}, "after": {…}, "seconds": …, …}
  demo.png         loss curves, maps of the embeddings, and an example search, if there is one that
                   captions mend: by the images' embeddings alone, and with the model's captions
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cafe.data.scenes import Split, write_scenes
from cafe.demo.figure import Clouds, Curves, ExampleSearch, FigureHit, draw_demo
from cafe.demo.measure import (
    SCORES,
    CaptionedScores,
    SceneScores,
    captioned_scores,
    evaluate_scenes,
    mended_search,
)
from cafe.errors import DataError
from cafe.evaluation.datasets.captioned import CaptionedImage, read_captioned_images
from cafe.evaluation.model_calls import CachedCalls, ModelCalls
from cafe.evaluation.results import package_versions
from cafe.media import open_image
from cafe.metrics import first_relevant_ranks
from cafe.model.vlm import CAFe
from cafe.precision import ComputePrecision, resolved_precision
from cafe.progress import progress_bar
from cafe.recipes import Recipe, load_recipe
from cafe.training.build import training_device
from cafe.training.log import StepRecord
from cafe.training.run import train
from cafe.types import Scores

# The example query describes an image with at least three object classes: it has some detail.
_SEARCH_CLASSES = 3
_SHOWN_HITS = 5
_FORECAST_STEP = 4
# Fewer are drawn sooner than a second process starts.
_SCENES_PER_PROCESS = 250


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """The size of the demo. `overrides` are recipe overrides (`batch.examples=8`)."""

    train_scenes: int = 3000
    train_questions: int = 5
    test_scenes: int = 500
    test_questions: int = 6
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Stages:
    """Prints each stage with its duration, and keeps the durations in `seconds`."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str, text: str) -> Iterator[None]:
        begin = time.perf_counter()
        self.console.print(text, style="bold", highlight=False)
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 1)
        self.console.print(f"   {self.seconds[name]:.0f} s", style="dim", highlight=False)

    @contextmanager
    def quiet(self, name: str, text: str) -> Iterator[None]:
        """A stage without a progress bar of its own, so a spinner shows that it runs."""
        with self(name, text), self.console.status(""):
            yield


def run_demo(
    out: Path,
    steps: int | None,
    seed: int,
    *,
    settings: DemoSettings | None = None,
    console: Console | None = None,
) -> None:
    """Write scenes, evaluate the base model, fine-tune it, evaluate again, and print a summary.

    Args:
        out: A folder that is empty or does not exist yet.
        steps: Training steps; None takes the number in the recipe.
        seed: Random seed for scenes and training.
        settings: The size of the demo; None for the defaults.
        console: Where stages and the summary are printed; None for stdout.

    Raises:
        DataError: `out` is not an empty folder.
    """
    settings, console = settings or DemoSettings(), console or Console()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is not an empty folder; remove it or choose another --out")
    stage = _Stages(console)
    with stage("scenes", "1. Writing scenes: images, captions, questions"):
        _write_scenes(out, seed, settings)
    recipe = _recipe(out, steps, seed, settings)
    precision = resolved_precision(recipe.precision, training_device())
    images = read_captioned_images(out / "test").images
    with stage.quiet("evaluate_before", f"2. Evaluating the base on {len(images)} unseen scenes"):
        calls = _calls(recipe.model, precision)
        before = evaluate_scenes(calls.score_examples, calls.generate, images)
    with stage("train", f"3. Fine-tuning with the joint objective: {recipe.schedule.steps} steps"):
        forecast = Forecast(console, recipe.schedule.steps or 0, stage.seconds["evaluate_before"])
        run = train(recipe, on_step=forecast)
    with stage.quiet("evaluate_after", "4. Evaluating the fine-tuned model, also with its words"):
        calls = CachedCalls(_calls(str(run.model_dir), precision))  # captions are written once
        after = evaluate_scenes(calls.score_examples, calls.generate, images)
        captioned = captioned_scores(calls.encode, calls.generate, images, after)
    mended = mended_search(after.images, captioned.images, after.captions)
    with stage.quiet("image", "5. Drawing the figure"):
        draw_demo(
            out / "demo.png",
            _curves(run.records),
            example_search(images, after, mended),
            before=Clouds(before.images, before.captions),
            after=Clouds(after.images, after.captions),
            mended=None
            if mended is None
            else example_search(images, replace(after, images=captioned.images), mended),
        )
    results = _results(before, after, captioned.scores, stage.seconds, recipe, precision, settings)
    results["mended_search"] = _mended(images, after, captioned, mended)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _print_summary(console, out, images[0], results)


def _write_scenes(out: Path, seed: int, settings: DemoSettings) -> None:
    sets: tuple[tuple[Split, int, int], ...] = (
        ("train", settings.train_scenes, settings.train_questions),
        ("test", settings.test_scenes, settings.test_questions),
    )
    total = sum(count for _, count, _ in sets)
    with progress_bar("scenes", total) as bar:
        for split, count, questions in sets:
            write_scenes(
                out / split,
                count,
                seed,
                split=split,
                questions_per_scene=questions,
                progress=lambda _: bar.more(1),
                processes=min(count // _SCENES_PER_PROCESS, os.cpu_count() or 1),
            )


def _recipe(out: Path, steps: int | None, seed: int, settings: DemoSettings) -> Recipe:
    overrides = [
        f"data.0.path={out / 'train' / 'captions.json'}",
        f"data.1.path={out / 'train' / 'questions.json'}",
        f"output_dir={out}",
        f"seed={seed}",
        *([] if steps is None else [f"schedule.steps={steps}"]),
        *settings.overrides,
    ]
    with as_file(files("cafe.recipes") / "demo.yaml") as path:
        return load_recipe(path, overrides)


def _calls(name_or_dir: str, precision: ComputePrecision) -> ModelCalls:
    return ModelCalls(CAFe.from_pretrained(name_or_dir), precision=precision)


@dataclass(slots=True)
class Forecast:
    """After a few steps, prints how long the rest of the demo will take.

    evaluation   seconds of the evaluation before training; the one after it is alike
    """

    console: Console
    steps: int
    evaluation: float
    _seconds: list[float] = field(default_factory=list)

    def __call__(self, record: StepRecord) -> None:
        if record.step > _FORECAST_STEP:
            return
        self._seconds.append(record.seconds)
        if record.step == _FORECAST_STEP < self.steps:
            # The first step is slower than the others: kernels are chosen and memory is allocated.
            each = float(np.median(self._seconds[1:]))
            rest = each * (self.steps - record.step) + self.evaluation
            minutes = max(1, round(rest / 60))
            self.console.print(
                f"   {each:.1f} s a step: about {minutes} min to the end of the demo",
                style="dim",
                highlight=False,
            )


def _curves(records: Sequence[StepRecord]) -> Curves:
    return Curves(
        steps=[record.step for record in records],
        contrastive=[record.contrastive for record in records],
        language=[record.language for record in records],
    )


def example_search(
    images: tuple[CaptionedImage, ...], scores: SceneScores, query: int | None = None
) -> ExampleSearch:
    """Search all images for the caption of a scene; None: the first one with some detail."""
    if query is None:
        detailed = (i for i, p in enumerate(images) if len(p.kinds or ()) >= _SEARCH_CLASSES)
        query = next(detailed, 0)
    cosines = scores.images @ scores.captions[query]
    nearest = np.argsort(-cosines, kind="stable")[:_SHOWN_HITS]
    rank = first_relevant_ranks(scores.captions[[query]], scores.images, [[query]])[0]
    hits = [
        FigureHit(open_image(images[i].image), float(cosines[i]), correct=bool(i == query))
        for i in nearest.tolist()
    ]
    return ExampleSearch(images[query].captions[0], hits, int(rank), len(images))


def _mended(
    images: tuple[CaptionedImage, ...],
    after: SceneScores,
    captioned: CaptionedScores,
    query: int | None,
) -> dict[str, Any] | None:
    """The search of `mended_search` for results.json, with what the model writes of its image."""
    if query is None:
        return None
    return {
        "text": images[query].captions[0],
        "image": Path(str(images[query].image.source)).name,
        "caption": captioned.written[query],
        "rank_alone": example_search(images, after, query).rank,
    }


def _results(
    before: SceneScores,
    after: SceneScores,
    captioned: Scores,
    seconds: dict[str, float],
    recipe: Recipe,
    precision: ComputePrecision,
    settings: DemoSettings,
) -> dict[str, Any]:
    return {
        "before": before.scores,
        "after": after.scores,
        "after_with_captions": captioned,
        "seconds": round(sum(seconds.values()), 1),
        "question_accuracy": {
            "before": before.question_accuracy,
            "after": after.question_accuracy,
        },
        "stages_seconds": seconds,
        "settings": {
            "seed": recipe.seed,
            "steps": recipe.schedule.steps,
            "precision": precision,
            "train_scenes": settings.train_scenes,
            "train_questions": settings.train_questions,
            "test_scenes": settings.test_scenes,
            "test_questions": settings.test_questions,
            "threads": torch.get_num_threads(),
        },
        "packages": package_versions(),
    }


def _table(columns: Sequence[str], rows: Mapping[str, Sequence[float]]) -> Table:
    """A score in each row, in words, with its values."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for name, values in rows.items():
        percent = name not in ("caption_loss", "modality_gap", "caption_object_f1")
        cells = (f"{v:.1%}" if percent else f"{v:.3f}" for v in values)
        table.add_row(name.replace("_", " "), *cells)
    return table


def _print_summary(
    console: Console, out: Path, example: CaptionedImage, results: dict[str, Any]
) -> None:
    before, after = results["before"], results["after"]
    captioned = results["after_with_captions"]
    rows = {name: (before[name], after[name]) for name in SCORES}
    console.print(_table(("before", "after"), rows))
    console.print("Images embedded with the captions that the fine-tuned model writes of them:")
    rows = {name: (after[name], value) for name, value in captioned.items()}
    console.print(_table(("image alone", "with its caption"), rows))
    mended = results["mended_search"]
    if mended is None:
        console.print("No search was found that images alone get wrong and their captions mend.")
    else:
        console.print(
            f"“{mended['text']}”: the image is ranked {mended['rank_alone']} alone, and first with "
            f"its caption, “{mended['caption']}”",
            highlight=False,
            markup=False,
        )
    console.print(f"Total: {results['seconds']:.0f} s. Results, model and demo.png are in {out}")
    model, image = str(out / "model"), str(example.image.source)
    commands = (
        ["cafe", "generate", model, "--image", image, "Describe this image."],
        [
            "cafe",
            "embed",
            model,
            str(out / "test" / "images"),
            "--out",
            str(out / "images.parquet"),
        ],
        ["cafe", "evaluate", model, "--task", "retrieval", "--data", str(out / "test")],
    )
    console.print("\nTry next:")
    for command in commands:
        console.print(f"  {shlex.join(command)}", highlight=False, soft_wrap=True, markup=False)
