"""`cafe ui`: `cafe serve --ui` with what a person at a browser needs."""

from __future__ import annotations

from typing import Annotated

import typer

from cafe.cli import serve
from cafe.cli.arguments import Model


def command(
    model: Model,
    index: Annotated[
        str | None, typer.Option(metavar="DIR", help="Search this index on the page.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; others need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="CAFE_API_KEY", help="What the page asks for first.")
    ] = None,
) -> None:
    """Search and ask on a web page.

    The same server as cafe serve --ui, which has more options.
    """
    serve.command(model, index=index, host=host, port=port, api_key=api_key, ui=True)
