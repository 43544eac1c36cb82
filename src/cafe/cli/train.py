"""`cafe train`: a recipe, with overrides, becomes a fine-tuned model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The run, in YAML.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes, e.g. optimizer.learning_rate=2e-5."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of output_dir.")
    ] = False,
) -> None:
    """Train as a recipe says.

    Any key of the recipe can be changed on the command line. Ctrl-C (exit code 130) and SIGTERM
    (143) end the step, save, and print the command that goes on.
    """
    from cafe.recipes import load_recipe

    _check_there(recipe)
    checked = load_recipe(recipe, overrides or [])  # before torch: a typo is told at once

    from cafe.train.run import train

    result = train(checked, resume=resume)
    if os.environ.get("RANK", "0") == "0":
        print(f"the model is in {result.model_dir}, the log in {result.log_path}")


def _check_there(recipe: Path) -> None:
    """A recipe that ships with cafe is copied first: its data paths start at its own folder.

    Raises RecipeError, with the command that copies it.
    """
    import shlex

    import cafe.recipes
    from cafe.errors import RecipeError

    shipped = Path(cafe.recipes.__file__).parent / recipe.name
    if not recipe.exists() and shipped.is_file():
        raise RecipeError(
            f"{recipe}: no such file. A recipe of that name ships with cafe; copy it, change what "
            f"is yours, and train that: cp {shlex.quote(str(shipped))} {shlex.quote(str(recipe))}"
        )
