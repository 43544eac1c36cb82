"""`cafe demo`: a small real model learns to retrieve and still answers, in minutes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results, images and the model. [default: demo, demo-2, …]"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps. [default: those of the recipe]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for scenes and training.")] = 0,
) -> None:
    """See a small model learn to retrieve.

    Fine-tunes the bundled model on generated scenes and measures it before and after.
    """
    from cafe.demo import run_demo

    run_demo(out or _free_folder("demo"), steps, seed)


def _free_folder(name: str) -> Path:
    """The first of name, name-2, name-3, … that does not exist: no earlier demo is overwritten."""
    return next(
        path
        for number in itertools.count(1)
        if not (path := Path(name if number == 1 else f"{name}-{number}")).exists()
    )
