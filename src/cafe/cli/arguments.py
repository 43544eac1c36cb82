"""Arguments that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="tiny, a checkpoint directory, or a hub id.")
]
