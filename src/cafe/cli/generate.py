"""`cafe generate`: ask the model a question, with or without images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cafe.cli.arguments import Model
from cafe.errors import printable


def command(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question or instruction.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="An image; repeatable.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum length of the answer, in tokens.")
    ] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Sampling temperature; 0, the default, is greedy decoding."),
    ] = None,
    best_of: Annotated[
        int | None,
        typer.Option(min=1, help="Sample N answers and print the one most faithful to the image."),
    ] = None,
) -> None:
    """Ask the model, with or without images."""
    from cafe.media import open_image
    from cafe.types import Image, user

    # Opened before the model loads, so that a bad image fails immediately.
    images = [Image(open_image(Image(path))) for path in image or []]

    from cafe.model.vlm import CAFe

    sampling: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    answers = CAFe.from_pretrained(model).generate(
        user(*images, prompt),
        max_new_tokens=max_new_tokens,
        stream=best_of is None,
        best_of=best_of,
        **sampling,
    )
    for piece in answers:
        print(printable(piece, sys.stdout), end="", flush=True)
    print()
