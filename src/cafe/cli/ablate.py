"""`cafe ablate`: train with either loss and with both, measure, and report."""

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
            help="The ablation (default: the one that ships) and changes to it.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Where runs and results are kept; the same folder goes on.")
    ] = Path("ablation"),
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.md", help="The report; figures go beside it. Default: in --out."
        ),
    ] = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep models that are measured.")
    ] = False,
) -> None:
    """Show what each of the two losses does.

    From one base, with the same data, steps and seeds: the language loss only, the contrastive loss
    only, both, and both with other weights. Interrupted, the same command goes on.
    """
    from importlib.resources import as_file, files

    from cafe.errors import RecipeError
    from cafe.recipes import load_ablation

    words = arguments or []
    overrides = [word for word in words if "=" in word]
    named = [word for word in words if "=" not in word]
    if len(named) > 1:
        raise RecipeError(f"{named[1]}: neither key=value nor the only recipe; name one recipe")
    with as_file(files("cafe.recipes") / "ablate.yaml") as shipped:
        ablation = load_ablation(named[0] if named else shipped, overrides)

    from cafe.ablate.run import run_ablation

    # Where runs are kept changes no number, so the report does not tell.
    told = [*words, *(["--report", str(report)] if report is not None else [])]
    run_ablation(
        ablation,
        out,
        report=report,
        keep_models=keep_models,
        command=shlex.join(["cafe", "ablate", *told]),
    )
