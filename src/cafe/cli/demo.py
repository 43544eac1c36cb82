"""`cafe demo`: a small real model learns to retrieve and keeps talking, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Option(help="Where results, pictures and the model go.")] = Path(
        "demo"
    ),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps; default: as the recipe says.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the scenes and of training.")] = 0,
) -> None:
    """See a small model learn to retrieve.

    Fine-tunes the bundled model on generated scenes and measures it before and after.
    """
    from cafe.demo import run_demo

    run_demo(out, steps, seed)
