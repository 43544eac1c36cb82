"""The command line: one thin file per verb, nothing heavy imported before a verb runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from cafe.cli import (
    ablate,
    compare,
    convert,
    data,
    demo,
    doctor,
    embed,
    evaluate,
    export,
    generate,
    index,
    mine,
    search,
    serve,
    train,
    ui,
)
from cafe.errors import CafeError
from cafe.memory import keep_memory

__all__ = ["app", "main"]

_SIGNALS = 128
INTERRUPTED = _SIGNALS + 2

_SERVERS = frozenset({"serve", "ui"})
"""They live long and give memory back; every other verb is faster for keeping it, and ends."""

# Plain help: rich's boxes would double the time that `cafe --help` takes.
app = typer.Typer(
    name="cafe",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (or CAFE_DEBUG=1).")
    ] = False,
) -> None:
    """One vision-language model that retrieves, reranks and answers."""
    if debug:
        os.environ["CAFE_DEBUG"] = "1"
    if context.invoked_subcommand not in _SERVERS:
        keep_memory()


app.command("demo")(demo.command)
app.command("train")(train.command)
app.command("evaluate")(evaluate.command)
app.command("compare")(compare.command)
app.command("ablate")(ablate.command)
app.command("embed")(embed.command)
app.command("index")(index.command)
app.command("search")(search.command)
app.command("generate")(generate.command)
app.command("mine")(mine.command)
app.command("convert")(convert.command)
app.command("export")(export.command)
app.command("serve")(serve.command)
app.command("ui")(ui.command)
app.add_typer(data.app, name="data")
app.command("doctor")(doctor.command)


def main() -> None:
    """Run `cafe`. An expected error is one line on stderr and exit code 2; Ctrl-C is 130."""
    try:
        app()
    except CafeError as error:
        if os.environ.get("CAFE_DEBUG", "0") not in {"", "0"}:
            raise
        prefix = "" if error.exit_code > _SIGNALS else "error: "  # a stop on request is no error
        print(prefix + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
