"""`cafe train`: fine-tune a model as a recipe, with overrides, describes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cafe.cli import completion


def command(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE.yaml",
            help="The run as a YAML file.",
            autocompletion=completion.recipes,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Overrides, e.g. optimizer.learning_rate=2e-5."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the newest checkpoint in output_dir.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Read everything, run one step, print what the run would be; write nothing.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print it as JSON.")
    ] = False,
) -> None:
    """Train a model from a recipe.

    Any key of the recipe can be overridden on the command line. Ctrl-C (exit code 130) and SIGTERM
    (143) finish the step, save, and print the command that resumes the run.
    """
    from cafe.errors import DataError
    from cafe.recipes import load_recipe

    if dry_run and resume:
        raise DataError("--dry-run runs the first step of a new run; leave out --resume")
    if as_json and not dry_run:
        raise DataError("--json prints a dry run; add --dry-run")
    _check_exists(recipe)
    checked = load_recipe(recipe, overrides or [])  # before torch, so that a typo fails immediately
    if dry_run:
        from cafe.training import dry_run as dry

        report = dry.dry_run(checked)
        print(report.json() if as_json else report)
        return

    from cafe.training.run import train

    result = train(checked, resume=resume)
    if os.environ.get("RANK", "0") == "0":
        print(f"the model is in {result.model_dir}, the log in {result.log_path}")


def _check_exists(recipe: Path) -> None:
    """A recipe shipped with cafe must be copied first: its data paths are relative to its folder.

    Raises RecipeError, with the command that copies it.
    """
    import shlex

    import cafe.recipes
    from cafe.errors import RecipeError

    shipped = Path(cafe.recipes.__file__).parent / recipe.name
    if not recipe.exists() and shipped.is_file():
        raise RecipeError(
            f"{recipe}: no such file. cafe ships with a recipe of that name; copy it, adapt it, "
            f"and train the copy: cp {shlex.quote(str(shipped))} {shlex.quote(str(recipe))}"
        )
