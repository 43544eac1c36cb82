"""Train every arm with every seed, measure every model, and report; what is done is kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cafe.ablate.arms import Run, arms, common_recipe, run_recipe, runs
from cafe.ablate.folder import Folder, check_base, check_run, kept_results
from cafe.ablate.gather import Measurements, gather, numbers
from cafe.data.scenes import write_scenes
from cafe.errors import DataError, RecipeError
from cafe.evaluate.results import StoredResult, write_json
from cafe.evaluate.run import Options, run_tasks
from cafe.evaluate.scoring import RESAMPLES
from cafe.evaluate.tasks import TASKS, is_scenes
from cafe.model.vlm import CAFe
from cafe.recipes import Ablation, Recipe
from cafe.report.ablation import write_report
from cafe.train.checkpoints import complete
from cafe.train.interrupt import Interrupted
from cafe.train.log import read_log
from cafe.train.run import train


def run_ablation(
    ablation: Ablation,
    out: Path,
    *,
    report: Path | None = None,
    keep_models: bool = False,
    command: str = "cafe ablate",
    console: Console | None = None,
) -> Path:
    """Do what is not done yet, and write the report; returns where it is.

    out          the folder of the ablation (`cafe.ablate.folder`)
    report       a Markdown file; None: `results.md` in `out`
    keep_models  measured models stay; else each is removed once all its results are there
    command      that the report names

    Raises:
        Interrupted: SIGINT or SIGTERM while training; the same call goes on.
        RecipeError, DataError: a recipe that cannot be ablated, a task that is no scenes task or
            cannot be run, or `out` holds something else.
    """
    console = console or Console(stderr=True)
    common = common_recipe(ablation)
    every = arms(ablation, common.objective)
    _check_tasks(ablation.tasks)
    folder = Folder(out)
    scenes = folder.scenes(ablation).absolute()
    recipes = {run: run_recipe(common, run, scenes, folder.run(run)) for run in runs(every)}
    check_base(folder, common.model)
    for run, recipe in recipes.items():  # before hours of work
        check_run(folder, run, recipe)
    if not scenes.exists():
        with folder.timed("scenes"):
            _tell(console, f"writing {ablation.train_scenes:,} scenes")
            write_scenes(
                scenes,
                ablation.train_scenes,
                ablation.scenes_seed,
                questions_per_scene=ablation.train_questions,
            )
    _tell(console, "the base")
    base = _measured(folder, "base", common.model, folder.base_results, ablation)
    measured: dict[Run, list[StoredResult]] = {}
    for number, (run, recipe) in enumerate(recipes.items(), 1):
        _tell(console, f"run {number} of {len(recipes)}: {run.name}")
        measured[run] = _run(folder, run, recipe, ablation, keep_models=keep_models)
    seconds = {run: _training_seconds(folder, run) for run in recipes}
    found = gather(
        Measurements(base, measured, seconds), ablation, common, command, folder.seconds()
    )
    write_json(out / "results.json", numbers(found))
    report = report or out / "results.md"
    write_report(found, report, resamples=RESAMPLES)
    _tell(console, f"report: {report}")
    return report


def _run(
    folder: Folder, run: Run, recipe: Recipe, ablation: Ablation, *, keep_models: bool
) -> list[StoredResult]:
    """The results of one run: kept ones, or those of its model, trained if it is not there."""
    results, model = folder.results(run), folder.model(run)
    kept = kept_results(results, ablation.tasks, ablation.test_scenes)
    if len(kept) < len(ablation.tasks):
        if not model.exists():
            _train(folder, run, recipe)
        shutil.rmtree(folder.run(run) / "checkpoints", ignore_errors=True)
    found = _measured(folder, run.name, str(model), results, ablation)
    if not keep_models:
        shutil.rmtree(model, ignore_errors=True)
    return found


def _train(folder: Folder, run: Run, recipe: Recipe) -> None:
    begun = bool(complete(folder.run(run) / "checkpoints"))
    try:
        with folder.timed(f"{run.name}: training"):
            train(recipe, resume=begun)
    except Interrupted as stop:
        raise Interrupted(
            f"stopped while training {run.name}; its state is saved, and the same `cafe ablate` "
            "command goes on from there",
            stop.exit_code - 128,
        ) from None


def _measured(
    folder: Folder, name: str, model: str, results: Path, ablation: Ablation
) -> list[StoredResult]:
    """The results of all tasks, in their order; those that are there are not measured again.

    Raises:
        DataError: a task that could not be run.
    """
    missing = [
        task
        for task in ablation.tasks
        if task not in kept_results(results, ablation.tasks, ablation.test_scenes)
    ]
    options = Options(limit=ablation.test_scenes, out=results)
    if missing:
        with folder.timed(f"{name}: measuring"):
            for outcome in run_tasks(lambda: CAFe.from_pretrained(model), model, missing, options):
                if outcome.state == "failed":
                    raise DataError(f"{name}, {outcome.task}: {outcome.reason}")
    kept = kept_results(results, ablation.tasks, ablation.test_scenes)
    return [kept[task] for task in ablation.tasks]


def _training_seconds(folder: Folder, run: Run) -> float:
    return sum(record.seconds for record in read_log(folder.run(run) / "log.jsonl"))


def _check_tasks(names: Sequence[str]) -> None:
    known = [name for name in TASKS if is_scenes(name)]
    wrong = next((name for name in names if name not in known), None)
    if wrong is not None:
        raise RecipeError(f"tasks: {wrong} is no task on scenes; there are {', '.join(known)}")


def _tell(console: Console, text: str) -> None:
    console.print(text, style="bold", highlight=False)
