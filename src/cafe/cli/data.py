"""`cafe data`: look at a data set as the model will see it; write the bundled world as files."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at data sets, and make one.", no_args_is_help=True)

_SHOWN_REJECTED = 10


class Split(StrEnum):
    """Test scenes show combinations of things that train scenes never show."""

    train = "train"
    test = "test"


@app.command("inspect")
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="As a recipe's data source.")],
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Other keys of the source, e.g. mode=chat or format=llava."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Whose templates and processor.")] = "tiny",
    count: Annotated[int, typer.Option(min=0, help="How many examples are shown.")] = 3,
    png: Annotated[Path | None, typer.Option(help="A folder to write their pictures to.")] = None,
) -> None:
    """Show examples as the model will see them.

    The format that was found, records that cannot be used, and of the first examples every
    sequence with its special tokens, token counts and pictures; what is learnt is in bold.
    """
    from cafe.recipes import load_source

    source = load_source(path, keys or [])  # before the data: a typo is told at once

    from rich.console import Console

    from cafe.cli.preview import preview
    from cafe.data.read import read_examples
    from cafe.train.examples import reading

    records = read_examples(source.path, reading(source))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{source.path}: format {records.format}, {len(records.examples):,} examples, "
        f"{len(records.rejected):,} records rejected"
    )
    for item in records.rejected[:_SHOWN_REJECTED]:
        console.print(f"  {item.record}: {item.reason}", style="red")
    if len(records.rejected) > _SHOWN_REJECTED:
        console.print(f"  and {len(records.rejected) - _SHOWN_REJECTED:,} more", style="red")
    shown = records.examples[:count]
    if not shown:
        return

    from cafe.model.vlm import CAFe

    collator = CAFe.from_pretrained(model).collator
    for number, example in enumerate(shown, 1):
        console.print()
        preview(console, collator, example, None if png is None else (png, f"{number}"))


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
