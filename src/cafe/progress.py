"""Progress bars: on stderr, so that stdout stays clean for pipes, or in a notebook's cell."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported when a bar is drawn: a library that embeds needs none of it
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn


@dataclass(frozen=True, slots=True)
class Bar:
    """How to advance a progress bar.

    to     called with the number of items done
    more   called with the number of items done since the last call
    """

    to: Callable[[int], None]
    more: Callable[[int], None]


@contextmanager
def progress_bar(
    label: str, total: int, *, show: bool = True, stays: bool = False
) -> Iterator[Bar]:
    """A bar with counts and the time left.

    Args:
        label: Text before the bar.
        total: Number of items.
        show: Draw nothing if False.
        stays: Keep the full bar; where no bar can be drawn (a log file), only that last line is
            written. If False the bar disappears, and a log file gets nothing.
    """
    if not show:
        yield Bar(lambda done: None, lambda count: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    show = stays or can_draw(console)
    with rich_progress(*columns, console=console, show=show, stays=stays) as progress:
        task = progress.add_task(label, total=total)
        yield Bar(
            lambda done: progress.update(task, completed=done),
            lambda count: progress.advance(task, count),
        )
        progress.refresh()  # in a notebook, stopping does not draw the last numbers


def can_draw(console: Console) -> bool:
    """Whether output can be redrawn in place; rich does not count a notebook as a terminal."""
    return console.is_terminal or console.is_jupyter


def rich_progress(*columns: ProgressColumn, console: Console, show: bool, stays: bool) -> Progress:
    """Rich's bar with these columns. It never redirects a stdout that is a pipe.

    Args:
        columns: What the bar shows.
        console: Where to draw it.
        show: Draw nothing if False.
        stays: As in `progress_bar`.
    """
    from rich.progress import Progress

    return Progress(
        *columns,
        console=console,
        disable=not show,
        transient=not stays,
        redirect_stdout=console.is_jupyter or sys.stdout.isatty(),
    )
