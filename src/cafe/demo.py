"""`cafe demo`: a small real model learns to retrieve and keeps talking, in minutes.

out/
  train/  test/    the scenes: pictures, captions, questions, truth
  model/           the fine-tuned model (`output_dir` of the run is `out`)
  results.json     {"before": {…}, "after": {…}, "seconds": …, …}
  demo.png         how it learned, what it finds, where its embeddings lie
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cafe.data.scenes import Split, write_scenes
from cafe.errors import DataError
from cafe.evaluate.calls import ModelCalls, Precision
from cafe.evaluate.data import Picture, read_pictures
from cafe.evaluate.run import package_versions
from cafe.evaluate.scenes import SCORES, SceneScores, evaluate_scenes
from cafe.media import open_image
from cafe.metrics import first_relevant_ranks
from cafe.model.vlm import CAFe
from cafe.recipes import Recipe, load_recipe
from cafe.report.picture import Clouds, Curves, Found, Search, draw_demo
from cafe.train.log import StepRecord
from cafe.train.run import train

_SEARCH_KINDS = 3  # the searched picture shows so many kinds of things: a text with some detail
_SHOWN_HITS = 5


@dataclass(frozen=True, slots=True)
class Settings:
    """How large the demo is. `overrides` are recipe overrides (`batch.examples=8`)."""

    train_scenes: int = 3000
    train_questions: int = 5
    test_scenes: int = 500
    test_questions: int = 6
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Stages:
    """Tells what happens and how long it takes."""

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
        """A stage that shows no progress of its own gets a sign of life."""
        with self(name, text), self.console.status(""):
            yield


def run_demo(
    out: Path,
    steps: int | None,
    seed: int,
    *,
    settings: Settings | None = None,
    console: Console | None = None,
) -> None:
    """Write scenes, measure the base, fine-tune it, measure again, and tell all of it.

    out    a folder that does not exist, or is empty
    steps  of training; None: as the recipe says
    seed   of the scenes and of training

    Raises:
        DataError: `out` holds something already.
    """
    settings, console = settings or Settings(), console or Console()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not an empty folder; remove it or name another --out")
    stage = _Stages(console)
    with stage("scenes", "1. Writing scenes: pictures, captions, questions"):
        _write_scenes(out, seed, settings, console)
    precision = faster_precision()
    recipe = _recipe(out, steps, seed, precision, settings)
    pictures = read_pictures(out / "test").pictures
    with stage.quiet("evaluate_before", f"2. Measuring the base on {len(pictures)} unseen scenes"):
        before = _measure(recipe.model, pictures, precision)
    with stage("train", f"3. Fine-tuning with the joint objective: {recipe.schedule.steps} steps"):
        run = train(recipe)
    with stage.quiet("evaluate_after", "4. Measuring again"):
        after = _measure(str(run.model_dir), pictures, precision)
    with stage.quiet("picture", "5. Drawing"):
        draw_demo(
            out / "demo.png",
            _curves(run.records),
            example_search(pictures, after),
            before=Clouds(before.images, before.captions),
            after=Clouds(after.images, after.captions),
        )
    results = _results(before, after, stage.seconds, recipe, settings)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _tell(console, out, pictures[0], results)


def faster_precision() -> Precision:
    """The number format in which this machine's default device multiplies matrices faster.

    A GPU, and a CPU with bfloat16 instructions, is faster in bf16; an older CPU is much slower.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        return "bf16"
    seconds = {}
    formats: tuple[tuple[Precision, torch.dtype], ...] = (
        ("bf16", torch.bfloat16),
        ("fp32", torch.float32),
    )
    for name, dtype in formats:
        left, right = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 768, dtype=dtype)
        times = []
        for _ in range(6):  # the first of them warms up
            begin = time.perf_counter()
            torch.mm(left, right)
            times.append(time.perf_counter() - begin)
        seconds[name] = min(times)
    return "bf16" if seconds["bf16"] < seconds["fp32"] else "fp32"


def _write_scenes(out: Path, seed: int, settings: Settings, console: Console) -> None:
    sets: tuple[tuple[Split, int, int], ...] = (
        ("train", settings.train_scenes, settings.train_questions),
        ("test", settings.test_scenes, settings.test_questions),
    )
    total = sum(count for _, count, _ in sets)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for split, count, questions in sets:
            write_scenes(
                out / split,
                count,
                seed,
                split=split,
                questions_per_scene=questions,
                progress=lambda _: bar.advance(task),
            )


def _recipe(
    out: Path, steps: int | None, seed: int, precision: Precision, settings: Settings
) -> Recipe:
    overrides = [
        f"data.0.path={out / 'train' / 'captions.json'}",
        f"data.1.path={out / 'train' / 'questions.json'}",
        f"output_dir={out}",
        f"seed={seed}",
        f"precision={precision}",
        *([] if steps is None else [f"schedule.steps={steps}"]),
        *settings.overrides,
    ]
    with as_file(files("cafe.recipes") / "demo.yaml") as path:
        return load_recipe(path, overrides)


def _measure(name_or_dir: str, pictures: tuple[Picture, ...], precision: Precision) -> SceneScores:
    calls = ModelCalls(CAFe.from_pretrained(name_or_dir), precision=precision)
    return evaluate_scenes(calls.read, calls.generate, pictures)


def _curves(records: Sequence[StepRecord]) -> Curves:
    return Curves(
        steps=[record.step for record in records],
        contrastive=[record.contrastive for record in records],
        language=[record.language for record in records],
    )


def example_search(pictures: tuple[Picture, ...], scores: SceneScores) -> Search:
    """Search the first scene with some detail by its caption, among all pictures."""
    detailed = (i for i, p in enumerate(pictures) if len(p.kinds or ()) >= _SEARCH_KINDS)
    query = next(detailed, 0)
    cosines = scores.images @ scores.captions[query]
    best = np.argsort(-cosines, kind="stable")[:_SHOWN_HITS]
    rank = first_relevant_ranks(scores.captions[[query]], scores.images, [[query]])[0]
    found = [
        Found(open_image(pictures[i].image), float(cosines[i]), right=bool(i == query))
        for i in best.tolist()
    ]
    return Search(pictures[query].captions[0], found, int(rank), len(pictures))


def _results(
    before: SceneScores,
    after: SceneScores,
    seconds: dict[str, float],
    recipe: Recipe,
    settings: Settings,
) -> dict[str, Any]:
    return {
        "before": before.scores,
        "after": after.scores,
        "seconds": round(sum(seconds.values()), 1),
        "question_accuracy": {
            "before": before.question_accuracy,
            "after": after.question_accuracy,
        },
        "stages_seconds": seconds,
        "settings": {
            "seed": recipe.seed,
            "steps": recipe.schedule.steps,
            "precision": recipe.precision,
            "train_scenes": settings.train_scenes,
            "train_questions": settings.train_questions,
            "test_scenes": settings.test_scenes,
            "test_questions": settings.test_questions,
            "threads": torch.get_num_threads(),
        },
        "packages": package_versions(),
    }


def _tell(console: Console, out: Path, example: Picture, results: dict[str, Any]) -> None:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    for name in SCORES:
        percent = name not in ("caption_loss", "modality_gap", "caption_object_f1")
        values = [results[when][name] for when in ("before", "after")]
        table.add_row(
            name.replace("_", " "), *(f"{v:.1%}" if percent else f"{v:.3f}" for v in values)
        )
    console.print(table)
    console.print(f"{results['seconds']:.0f} s in all. Results, model and demo.png: {out}")
    model, picture = str(out / "model"), str(example.image.source)
    commands = (
        ["cafe", "generate", model, "--image", picture, "Describe this image."],
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
