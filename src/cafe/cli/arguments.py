"""What several verbs share: arguments, and how they print what was skipped or left out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from cafe.cli import completion
from cafe.errors import printable

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="tiny, a checkpoint directory, or a hub id.",
        autocompletion=completion.models,
    ),
]

PairsData = Annotated[
    str,
    typer.Argument(metavar="DATA", help="A data source with pairs, as in a recipe's data.path."),
]

CaptionOption = Annotated[
    bool,
    typer.Option(
        "--caption",
        help="Embed images together with captions that the model writes of them; finds more.",
    ),
]

ThinkOption = Annotated[
    int | None,
    typer.Option(
        "--think",
        min=0,
        metavar="TOKENS",
        help="Embed images after what the model says of them, in at most TOKENS tokens.",
    ),
]

_NO_SUCH_FILE = ": no such file"
_SHOWN = 3


class SkippedLines:
    """Prints a line on stderr for each item that is skipped, but of missing images the first only.

    Thousands of missing images have one cause, which a line for each would hide.
    """

    def __init__(self) -> None:
        self.missing = 0

    def __call__(self, line: str) -> None:
        self.missing += _NO_SUCH_FILE in line
        if _NO_SUCH_FILE not in line or self.missing <= _SHOWN:
            print(printable(f"skipped {line}", sys.stderr), file=sys.stderr)


@contextmanager
def skipped_lines() -> Iterator[SkippedLines]:
    """What prints lines of skipped items; the number of missing images follows at the end."""
    lines = SkippedLines()
    try:
        yield lines
    finally:
        if lines.missing > _SHOWN:
            print(
                f"skipped {lines.missing - _SHOWN:,} more whose image is not there, "
                f"{lines.missing:,} in all; do image paths start at another folder?",
                file=sys.stderr,
            )


def silent_note(count: int) -> str:
    """How many images have no caption or thought, though they should."""
    return f"{count:,} images embedded alone: the model says nothing of them"


def left_out_line(left_out: Counter[str]) -> str:
    """How many files of a folder were left out, by kind, the most frequent first."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common())
    total = left_out.total()
    what = "file that is not an image" if total == 1 else "files that are not images"
    return f"left out: {total:,} {what} ({kinds})"
