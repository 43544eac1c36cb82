"""`cafe report`: runs and results as one page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cafe.errors import printable


def command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="The output_dir of runs, and --json folders of cafe evaluate.",
        ),
    ],
    to: Annotated[Path, typer.Option(help="The page; an earlier one is replaced.")] = Path(
        "report.html"
    ),
) -> None:
    """Write runs and results as one page.

    Curves, samples and searches before and after, maps of embeddings, speed, memory, recipes; and
    tables of results with intervals. The page opens from disk and needs no network.
    """
    from cafe.training.run_report import write_report

    report = write_report(paths, to)
    for notice in report.notices:
        print(printable(f"warning: {notice}", sys.stderr), file=sys.stderr)
    print(report.path)
