"""Arguments that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="tiny, a checkpoint directory, or a hub id.")
]

ServedIndex = Annotated[
    str | None, typer.Option("--index", metavar="DIR", help="An index to search too.")
]
Host = Annotated[str, typer.Option(help="Where to listen; beyond this machine only with a key.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="CAFE_API_KEY", help="What clients send, and the page asks for first."),
]
