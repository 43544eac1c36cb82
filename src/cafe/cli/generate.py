"""`cafe generate`: ask the model something, about pictures or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cafe.cli.arguments import Model


def command(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="A picture; may be given several times.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0.01, help="Sample at this temperature; greedy without.")
    ] = None,
    best_of: Annotated[
        int | None,
        typer.Option(
            min=1, help="Sample so many answers, and give the most faithful to the picture."
        ),
    ] = None,
) -> None:
    """Ask the model, with or without pictures."""
    from cafe.media import open_image
    from cafe.types import Image, user

    # Opened before the model loads: a bad picture is told at once.
    pictures = [Image(open_image(Image(path))) for path in image or []]

    from cafe.model.vlm import CAFe

    sampling: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    answers = CAFe.from_pretrained(model).generate(
        user(*pictures, prompt),
        max_new_tokens=max_new_tokens,
        stream=best_of is None,
        best_of=best_of,
        **sampling,
    )
    for piece in answers:
        print(piece, end="", flush=True)
    print()
