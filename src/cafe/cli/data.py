"""`cafe data scenes`: write the bundled world as files."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make data sets.", no_args_is_help=True)


class Split(StrEnum):
    """Test scenes show combinations of things that train scenes never show."""

    train = "train"
    test = "test"


@app.command("scenes")
def scenes(
    out: Annotated[Path, typer.Option(help="A new folder.")],
    count: Annotated[int, typer.Option(min=1, help="How many scenes.")],
    seed: Annotated[int, typer.Option(help="Another seed gives other scenes.")],
    split: Annotated[
        Split, typer.Option(help="Test scenes hold unseen combinations.")
    ] = Split.train,
) -> None:
    """Write generated pictures with captions.

    And questions with answers, and the exact truth of every picture.
    """
    from cafe.cli.progress import progress_bar
    from cafe.data.scenes import write_scenes

    with progress_bar("scenes", count) as done:
        write_scenes(out, count, seed, split=split.value, progress=done)
    print(f"{count} scenes in {out}")
