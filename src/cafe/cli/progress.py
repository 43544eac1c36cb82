"""A progress bar on stderr, so that stdout stays clean for pipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes how many of `total` are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeLeft())
    console = Console(stderr=True)
    silent = not console.is_terminal  # a log file wants no bar
    with Progress(*columns, console=console, transient=True, disable=silent) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)
