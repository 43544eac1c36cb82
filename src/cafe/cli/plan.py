"""`cafe plan`: what a run will hold in memory, before anything is downloaded."""

from __future__ import annotations

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
        typer.Argument(metavar="KEY=VALUE", help="Overrides, e.g. tuning.kind=lora."),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Say whether it can fit on this GPU, e.g. h100.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Number of GPUs.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Count what a training run holds on each GPU.

    Parameters by part, and the bytes of weights, gradients and AdamW's moments, for the recipe and
    for settings that need less. Neither weights nor a GPU are needed: the model's config.json is
    enough. What a step needs on top is measured by `cafe train --dry-run`.
    """
    from cafe.planning.plan import plan

    report = plan(recipe, overrides=overrides or (), gpu=gpu, count=count)
    print(report.json() if as_json else report)
