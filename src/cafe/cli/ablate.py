"""`cafe ablate`: train with each loss alone and with both, evaluate, and write a report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE.yaml] [KEY=VALUE]...",
            help="Ablation recipe (shipped with cafe: ablate.yaml, the default, and "
            "own-words.yaml), and overrides.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for runs and results; given again, the ablation resumes.")
    ] = Path("ablation"),
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.md", help="The report, with its figures next to it. [default: in --out]"
        ),
    ] = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep the models after their evaluation.")
    ] = False,
) -> None:
    """Show what each of the two losses does.

    Trains one base model on the same data with the same steps and seeds: with the language loss
    only, with the contrastive loss only, with both, and with both at other weights. After an
    interruption, the same command resumes.
    """
    from importlib.resources import as_file, files

    from cafe.errors import RecipeError
    from cafe.recipes import load_ablation

    arguments = arguments or []
    overrides = [argument for argument in arguments if "=" in argument]
    recipes = [argument for argument in arguments if "=" not in argument]
    if len(recipes) > 1:
        raise RecipeError(
            f"{recipes[1]}: neither key=value nor the only recipe; give a single recipe"
        )
    recipe = Path(recipes[0]) if recipes else None
    name = "ablate.yaml" if recipe is None else recipe.name
    with as_file(files("cafe.recipes") / name) as shipped:
        if recipe is None or (not recipe.exists() and shipped.is_file()):
            recipe = shipped
        ablation = load_ablation(recipe, overrides)

    from cafe.ablation.run import run_ablation

    # The folder of the runs does not affect any number, so the report omits it.
    repeatable = [*arguments, *(["--report", str(report)] if report is not None else [])]
    run_ablation(
        ablation,
        out,
        report=report,
        keep_models=keep_models,
        command=shlex.join(["cafe", "ablate", *repeatable]),
    )
