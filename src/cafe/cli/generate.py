"""`cafe generate`: ask the model something, about pictures or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cafe.cli.arguments import Model


def command(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="A picture; may be given several times.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
) -> None:
    """Ask the model, with or without pictures."""
    from cafe.media import open_image
    from cafe.types import Image, user

    # Opened before the model loads: a bad picture is told at once.
    pictures = [Image(open_image(Image(path))) for path in image or []]

    from cafe.model.vlm import CAFe

    pieces = CAFe.from_pretrained(model).generate(
        user(*pictures, prompt), max_new_tokens=max_new_tokens, stream=True
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
