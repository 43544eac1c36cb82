"""The command line: one thin file per verb, nothing heavy imported before a verb runs.

A verb's file parses, fails early, and prints; its job is a function of another package. Jobs report
through the logger `cafe`, which is silent for library users and shown on stderr here.
"""

from __future__ import annotations

import _thread
import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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
    plan,
    report,
    search,
    serve,
    think,
    train,
    watch,
)
from cafe.errors import CafeError, printable
from cafe.memory import keep_memory

__all__ = ["app", "main"]

_SIGNALS = 128
INTERRUPTED = _SIGNALS + 2

_SERVERS = frozenset({"serve", "ui"})
"""They run for long and must return freed memory; the other verbs are faster when they keep it."""


_GO_ON = {
    "train": "--resume goes on from the newest complete checkpoint, if there is one",
    "watch": "the run that was watched is not touched",
    "index": "what is finished is kept, and the same command goes on from there",
    "ablate": "what is finished is kept, and the same command goes on from there",
    "evaluate": "with --json, what is finished is kept, and the same command goes on from there",
    "embed": "with --shard-size, what is finished is kept, and the same command goes on from there",
}
"""How to go on after Ctrl-C, where something is kept."""


class _Verbs(TyperGroup):
    """Says on stderr that Ctrl-C ended a verb; typer alone ends it in silence."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            kept = _GO_ON.get(ctx.invoked_subcommand or "")
            print("stopped by Ctrl-C" + (f"; {kept}" if kept else ""), file=sys.stderr, flush=True)
            raise typer.Exit(INTERRUPTED) from None


class _StderrHandler(logging.Handler):
    """Writes to the present `sys.stderr`, which a progress bar replaces while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        print(printable(self.format(record), sys.stderr), file=sys.stderr, flush=True)


_HANDLER = _StderrHandler(logging.INFO)

# Plain help: rich's boxes would double the time that `cafe --help` takes.
app = typer.Typer(
    name="cafe",
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(f"cafe-vlm {metadata.version('cafe-vlm')}")
        raise typer.Exit()


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (or CAFE_DEBUG=1).")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """One vision-language model that retrieves, reranks and answers."""
    if debug:
        os.environ["CAFE_DEBUG"] = "1"
    _show_messages(context)
    if context.invoked_subcommand not in _SERVERS:
        keep_memory()


def _show_messages(context: typer.Context) -> None:
    """Print what jobs log on stderr, until the command ends."""
    logger = logging.getLogger("cafe")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(_HANDLER)

    def restore() -> None:
        logger.removeHandler(_HANDLER)
        logger.setLevel(level)

    context.call_on_close(restore)


app.command("demo")(demo.command)
app.command("plan")(plan.command)
app.command("train")(train.command)
app.command("watch")(watch.command)
app.command("report")(report.command)
app.command("evaluate")(evaluate.command)
app.command("compare")(compare.command)
app.command("ablate")(ablate.command)
app.command("embed")(embed.command)
app.command("index")(index.command)
app.command("search")(search.command)
app.command("generate")(generate.command)
app.command("mine")(mine.command)
app.command("think")(think.command)
app.command("convert")(convert.command)
app.command("export")(export.command)
app.command("serve")(serve.command)
app.command("ui")(serve.ui_command)
app.add_typer(data.app, name="data")
app.command("doctor")(doctor.command)


def main() -> None:
    """Run `cafe`. An expected error is one line on stderr and exit code 2; Ctrl-C is 130."""
    try:
        with _no_lost_interrupt():
            app()
    except (CafeError, OSError) as error:
        expected = _expected(error)
        if expected is None or os.environ.get("CAFE_DEBUG", "0") not in {"", "0"}:
            raise
        prefix = (
            "" if expected.exit_code > _SIGNALS else "error: "
        )  # stopping on request is not an error
        message = prefix + " ".join(str(expected).split())
        print(printable(message, sys.stderr), file=sys.stderr)
        sys.exit(expected.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@contextmanager
def _no_lost_interrupt() -> Iterator[None]:
    """Raise a Ctrl-C again that came where Python drops exceptions, as imports of torch often are.

    A callback of a weak reference, or a `__del__`: Python would print a traceback and go on.
    """
    before = sys.unraisablehook

    def report(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            # Later: raised in here, it would be dropped again.
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            before(dropped)

    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = before


def _expected(error: CafeError | OSError) -> CafeError | None:
    """The error as a user is told; None where it is a fault of ours."""
    if isinstance(error, CafeError):
        return error
    if error.errno != errno.ENAMETOOLONG:
        return None
    # Asking whether a name is that of a file, as every verb does, fails for one that is too long.
    name = str(error.filename or "")
    return CafeError(f"{name[:60]}… is not a file: its name is too long ({len(name):,} characters)")
