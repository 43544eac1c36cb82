"""Train every arm with every seed, evaluate every model, and report; finished work is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from cafe.ablation.arms import (
    SCENE_FILES,
    THOUGHTS,
    Run,
    arms,
    common_recipe,
    recipe_of,
    run_recipe,
    runs,
)
from cafe.ablation.folder import Folder, check_base, check_run, kept_results
from cafe.ablation.gather import Measurements, gather, numbers
from cafe.ablation.report import write_report
from cafe.data.scenes import write_scenes
from cafe.errors import DataError, RecipeError
from cafe.evaluation.registry import TASKS, is_scenes
from cafe.evaluation.results import StoredResult
from cafe.evaluation.run import Options, run_tasks
from cafe.evaluation.scoring import RESAMPLES
from cafe.files import write_json
from cafe.model.vlm import CAFe
from cafe.recipes import Ablation, Objective, Recipe
from cafe.retrieval.thinking import write_thoughts
from cafe.training.checkpoints import complete
from cafe.training.log import read_log
from cafe.training.run import train
from cafe.training.stopping import Interrupted


def _both_losses(objective: Objective) -> bool:
    return min(objective.contrastive_weight, objective.language_weight) > 0


_MEASURED_IF: dict[str, Callable[[Objective], bool]] = {
    "scenes-captions": _both_losses,
    "scenes-match": _both_losses,
    "scenes-likelihood": _both_losses,
    "scenes-thoughts": lambda objective: objective.thought_weight > 0,
    "scenes-tokens": lambda objective: objective.multi_vector_weight > 0,
}
"""Tasks that only some models are measured by: those that were trained for it. What words are worth
to an embedding is a question about models that have learned both."""


def run_ablation(
    ablation: Ablation,
    out: Path,
    *,
    report: Path | None = None,
    keep_models: bool = False,
    command: str = "cafe ablate",
    console: Console | None = None,
) -> Path:
    """Do what is not done yet, and write the report.

    Args:
        ablation: What to run.
        out: The folder of the ablation (`cafe.ablation.folder`).
        report: The Markdown file to write; None for `results.md` in `out`.
        keep_models: Keep evaluated models; otherwise each is removed once it has all its results.
        command: The command that the report names.
        console: Where progress is printed; None for stderr.

    Returns:
        The path of the report.

    Raises:
        Interrupted: SIGINT or SIGTERM during training; the same call resumes.
        RecipeError: the recipe cannot be ablated, or a task does not run on scenes.
        DataError: a task failed, or `out` belongs to another ablation.
    """
    console = console or Console(stderr=True)
    common = common_recipe(ablation)
    all_arms = arms(ablation, common.objective)
    _check_tasks(ablation.tasks)
    folder = Folder(out)
    scenes = folder.scenes(ablation).absolute()
    recipes = {
        run: run_recipe(recipe_of(ablation, run.arm), run, scenes, folder.run(run))
        for run in runs(all_arms)
    }
    check_base(folder, common.model)
    for run, recipe in recipes.items():  # before hours of work
        check_run(folder, run, recipe)
    if not scenes.exists():
        with folder.timed("scenes"):
            _print(console, f"Writing {ablation.train_scenes:,} scenes")
            write_scenes(
                scenes,
                ablation.train_scenes,
                ablation.scenes_seed,
                questions_per_scene=ablation.train_questions,
            )
    thoughts = scenes / THOUGHTS
    if any(s.thoughts == str(thoughts) for r in recipes.values() for s in r.data):
        with folder.timed("thoughts"):
            _print(console, "The base describes the training scenes")
            write_thoughts(common.model, scenes / SCENE_FILES[0], out=thoughts)
    _print(console, "Evaluating the base")
    tasks = _tasks(ablation, None)
    base = _evaluate(folder, "base", common.model, folder.base_results, ablation, tasks)
    results: dict[Run, list[StoredResult]] = {}
    for number, (run, recipe) in enumerate(recipes.items(), 1):
        _print(console, f"Run {number} of {len(recipes)}: {run.name}")
        results[run] = _run(folder, run, recipe, ablation, keep_models=keep_models)
    seconds = {run: _training_seconds(folder, run) for run in recipes}
    findings = gather(
        Measurements(base, results, seconds), ablation, common, command, folder.seconds()
    )
    write_json(out / "results.json", numbers(findings))
    report = report or out / "results.md"
    write_report(findings, report, resamples=RESAMPLES)
    _print(console, f"Report: {report}")
    return report


def _run(
    folder: Folder, run: Run, recipe: Recipe, ablation: Ablation, *, keep_models: bool
) -> list[StoredResult]:
    """The results of one run; trains and evaluates its model unless they exist already."""
    results, model, tasks = folder.results(run), folder.model(run), _tasks(ablation, recipe)
    kept = kept_results(results, tasks, ablation.test_scenes)
    if len(kept) < len(tasks):
        if not model.exists():
            _train(folder, run, recipe)
        shutil.rmtree(folder.run(run) / "checkpoints", ignore_errors=True)
    evaluated = _evaluate(folder, run.name, str(model), results, ablation, tasks)
    if not keep_models:
        shutil.rmtree(model, ignore_errors=True)
    return evaluated


def _train(folder: Folder, run: Run, recipe: Recipe) -> None:
    started = bool(complete(folder.run(run) / "checkpoints"))
    try:
        with folder.timed(f"{run.name}: training"):
            train(recipe, resume=started)
    except Interrupted as stop:
        raise Interrupted(
            f"interrupted while training {run.name}; its state is saved, and the same "
            "`cafe ablate` command resumes from there",
            stop.exit_code - 128,
        ) from None


def _evaluate(
    folder: Folder, name: str, model: str, results: Path, ablation: Ablation, tasks: Sequence[str]
) -> list[StoredResult]:
    """The results of the tasks, in their order; tasks with a result are not evaluated again.

    Raises:
        DataError: a task failed.
    """
    before = kept_results(results, tasks, ablation.test_scenes)
    missing = [task for task in tasks if task not in before]
    options = Options(limit=ablation.test_scenes, out=results)
    if missing:
        with folder.timed(f"{name}: measuring"):
            for outcome in run_tasks(lambda: CAFe.from_pretrained(model), model, missing, options):
                if outcome.state == "failed":
                    raise DataError(f"{name}, {outcome.task}: {outcome.reason}")
    kept = kept_results(results, tasks, ablation.test_scenes)
    return [kept[task] for task in tasks]


def _tasks(ablation: Ablation, recipe: Recipe | None) -> list[str]:
    """The tasks of a run, or of the base (None)."""
    return [
        task
        for task in ablation.tasks
        if task not in _MEASURED_IF or (recipe is not None and _MEASURED_IF[task](recipe.objective))
    ]


def _training_seconds(folder: Folder, run: Run) -> float:
    return sum(record.seconds for record in read_log(folder.run(run) / "log.jsonl"))


def _check_tasks(names: Sequence[str]) -> None:
    known = [name for name in TASKS if is_scenes(name)]
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise RecipeError(
            f"tasks: {unknown} is not a task on scenes; choose from {', '.join(known)}"
        )


def _print(console: Console, text: str) -> None:
    console.print(text, style="bold", highlight=False)
