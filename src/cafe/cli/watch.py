"""`cafe watch`: where a training is, live in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The output_dir of a run, or its log.jsonl.")
    ],
    measures: Annotated[
        list[str] | None,
        typer.Option("--measure", help="Show this measure of the evaluations; repeat it for more."),
    ] = None,
    every: Annotated[
        float, typer.Option("--every", min=0.1, help="Seconds between two looks at the log.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print where it is, and end.")] = False,
) -> None:
    """Watch a training run in the terminal.

    Steps, losses, the curves of its evaluations, and the time left, until its last step is done;
    Ctrl-C ends it earlier, and the run goes on. Only the log is read.
    """
    from cafe.training.watching import watch

    watch(run, measures=measures or (), every_seconds=every, once=once)
