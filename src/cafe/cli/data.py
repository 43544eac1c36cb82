"""`cafe data`: show a data set as the model will see it; write the bundled world as files."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cafe.errors import printable

if TYPE_CHECKING:
    import PIL.Image
    from rich.console import Console
    from rich.text import Text

    from cafe.model.rows.collate import Collator
    from cafe.recipes import DataSource, Recipe
    from cafe.types import Example

app = typer.Typer(help="Look at data sets, and make one.", no_args_is_help=True)

_SHOWN_SKIPPED = 10
_IMAGE_COLUMNS = 32  # width of an image on the terminal, in characters


class SceneSplit(StrEnum):
    """Test scenes show combinations of objects that training scenes never show."""

    train = "train"
    test = "test"


@app.command("inspect")
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A data source, as in a recipe; or a recipe.")
    ],
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Other keys of the source, e.g. mode=chat or format=llava; or of the recipe.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model whose chat template and processor to use; default: the recipe's, or tiny."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=0, help="Number of examples to show.")] = 3,
    png: Annotated[Path | None, typer.Option(help="Folder to write their images to.")] = None,
) -> None:
    """Show examples as the model will see them.

    The detected format, the records that cannot be used, and for the first examples every sequence
    with its special tokens, token counts and images; learned tokens are in bold. For a recipe,
    the first examples of each source as its objective trains them; latent tokens and thoughts are
    shown by `cafe train --dry-run`.
    """
    from cafe.recipes import is_recipe, load_recipe, load_source

    # Before the data is read: a typo is reported immediately.
    recipe = load_recipe(path, keys or []) if is_recipe(path) else None
    sources = [load_source(path, keys or [])] if recipe is None else recipe.data

    from rich.console import Console

    from cafe.training.data import trained_part

    console = Console(highlight=False, markup=False, soft_wrap=True)
    collator: Collator | None = None
    number = 0
    for source in sources:
        for example in _read(console, source)[:count]:
            number += 1
            console.print()
            part = example if recipe is None else trained_part(example, recipe.objective)
            if part is None:
                console.print(f"example {example.id!r}: its objective learns nothing from it")
                continue
            collator = collator or _collator(model, recipe)
            preview(console, collator, part, None if png is None else (png, f"{number}"))


def _read(console: Console, source: DataSource) -> list[Example]:
    """The examples of a source; prints its format and its skipped records."""
    from cafe.data.quarantine import summarized
    from cafe.data.read import read_examples
    from cafe.data.records import ReadOptions
    from cafe.errors import DataError

    records = read_examples(source.path, ReadOptions.of(source))
    console.print(
        f"{source.path}: format {records.format}, {len(records.examples):,} examples, "
        f"{len(records.skipped):,} records skipped"
    )
    for change, count in records.changes.items():
        console.print(f"  {count:,} records with {change}")
    lines = [printable(line, console.file) for line in summarized(records.skipped)]
    for line in lines[:_SHOWN_SKIPPED]:
        console.print(f"  {line.removeprefix(f'{source.path}, ')}", style="red")
    if len(lines) > _SHOWN_SKIPPED:
        console.print(f"  and {len(lines) - _SHOWN_SKIPPED:,} more", style="red")
    if not records.examples:
        raise DataError(f"{source.path}: no record can be used")
    return records.examples


def _collator(model: str | None, recipe: Recipe | None) -> Collator:
    """The collator of the model, or the one that the recipe trains with."""
    from cafe.model.vlm import CAFe
    from cafe.training.build import build_collator

    if recipe is None:
        return CAFe.from_pretrained(model or "tiny").collator
    return build_collator(recipe, CAFe.from_pretrained(model or recipe.model))


def preview(
    console: Console, collator: Collator, example: Example, png: tuple[Path, str] | None = None
) -> None:
    """Print an example, or one line that says why it cannot be collated.

    Args:
        console: Where to print.
        collator: How the model sees examples.
        example: The example.
        png: A folder, and the beginning of names of the files that its images are written to.
    """
    from rich.text import Text

    from cafe.errors import DataError
    from cafe.model.rows.inspect import opened_images, row_tokens, sequence_views

    console.print(f"example {example.id!r}", style="bold")
    try:
        views = sequence_views(collator, example)
        images = list(opened_images(example, collator.max_frames))
        tokens = row_tokens(collator, example)
    except DataError as error:
        console.print(printable(f"  cannot be used: {error}", console.file), style="red")
        return
    for number, (name, image) in enumerate(images, 1):
        where = "" if png is None else f", {_save_png(image, *png, number)}"
        console.print(f"  {name} {image.width}x{image.height}{where}")
        if console.is_terminal:
            console.print(half_blocks(image, _IMAGE_COLUMNS))
    for view in views:
        labelled = f", {view.labelled_tokens} learned" if view.labelled_tokens else ""
        console.print(
            f"  {view.name}: {view.image_tokens} image tokens, {view.text_tokens} text tokens"
            f"{labelled}",
            style="cyan",
        )
        runs = ((printable(r.text, console.file), "bold" if r.labelled else "") for r in view.runs)
        text = Text.assemble(*runs)
        for line in text.split("\n", allow_blank=True):
            console.print(Text("    ").append_text(line))
    alone = sum(view.image_tokens + view.text_tokens for view in views)
    console.print(f"  in one row: {tokens} tokens, alone {alone}", style="dim")


def half_blocks(image: PIL.Image.Image, width: int) -> Text:
    """An image drawn in `width` columns of characters, each of which shows two pixels."""
    import PIL.Image
    from rich.style import Style
    from rich.text import Text

    height = max(1, round(image.height / image.width * width / 2))
    small = image.resize((width, 2 * height), PIL.Image.Resampling.BOX)
    text = Text()
    for line in range(height):
        for column in range(width):
            upper, lower = (_hex(small, column, 2 * line + i) for i in (0, 1))
            text.append("▀", Style(color=upper, bgcolor=lower))
        text.append("\n" if line + 1 < height else "")
    return text


def _hex(image: PIL.Image.Image, x: int, y: int) -> str:
    pixel = image.getpixel((x, y))
    assert isinstance(pixel, tuple)  # RGB
    return "#{:02x}{:02x}{:02x}".format(*pixel)


def _save_png(image: PIL.Image.Image, folder: Path, name: str, number: int) -> Path:
    from cafe.files import writing

    path = folder / f"{name}-{number}.png"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return path


@app.command("scenes")
def scenes(
    out: Annotated[Path, typer.Option(help="A new folder.")],
    count: Annotated[int, typer.Option(min=1, help="Number of scenes.")],
    seed: Annotated[int, typer.Option(help="Random seed of the scenes.")],
    split: Annotated[
        SceneSplit, typer.Option(help="Test scenes contain unseen combinations.")
    ] = SceneSplit.train,
    negatives: Annotated[
        int, typer.Option(min=0, help="Hard negative captions per scene, each with one error.")
    ] = 0,
) -> None:
    """Write generated images with captions.

    Also questions with answers, and the exact content of every image.
    """
    from cafe.data.scenes import write_scenes
    from cafe.progress import progress_bar

    with progress_bar("scenes", count) as bar:
        write_scenes(
            out,
            count,
            seed,
            split=split.value,
            progress=bar.to,
            negatives_per_scene=negatives,
        )
    print(f"{count} scenes in {out}")
