"""A running training, or a finished one, as its log tells it: `cafe watch`.

Only `log.jsonl` is read, so a run is watched from any process that sees its folder, and nothing
that the run does depends on it. Nothing here imports torch.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cafe.errors import DataError
from cafe.training.log import FURTHER_LOSSES, LogContent, LogReader, StepRecord

RECENT = 50
"""Number of latest steps that rates and means are of."""
QUIET_SECONDS = 300.0
"""After so long without a new line it is said that nothing new comes."""
CURVE_WIDTH = 40

_LOSSES = ("loss", "contrastive", "language", *FURTHER_LOSSES)
_BARS, _PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-~=+*#"


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Where a run is.

    log             its log
    content         what the log has
    age_seconds     since the log was last written
    """

    log: Path
    content: LogContent
    age_seconds: float

    @property
    def step(self) -> int:
        """Number of steps that are done, as far as the log has them."""
        return self.content.steps[-1].step if self.content.steps else 0

    @property
    def total(self) -> int | None:
        """Number of steps of the whole run; None: the log does not say it."""
        return self.content.steps[-1].total if self.content.steps else None

    @property
    def finished(self) -> bool:
        """Whether the last step is done, or the run has stopped early."""
        early = any(step == self.step for step, _ in self.content.stops)
        return early or (self.total is not None and self.step >= self.total)

    @property
    def seconds_left(self) -> float | None:
        """Of steps at their recent rate, and of evaluations as they came; None: not known."""
        if self.total is None:
            return None
        per_step = median(record.seconds for record in self.content.steps[-RECENT:])
        evaluations = self.content.evaluations
        spent = sum(record.seconds for record in evaluations if record.step > 0)
        return (self.total - self.step) * (per_step + spent / max(self.step, 1))

    def values(self, loss: str) -> list[float]:
        """A loss of every step that has it."""
        found = (getattr(record, loss) for record in self.content.steps)
        return [value for value in found if value is not None]

    def measures(self) -> list[str]:
        """The measures of the evaluations, in their order."""
        return list(dict.fromkeys(n for r in self.content.evaluations for n in r.scores))


def run_status(run: str | os.PathLike[str]) -> RunStatus:
    """Read where a run is.

    Args:
        run: Its `output_dir`, or its log.jsonl.

    Raises:
        DataError: There is no log.

    Example:
        >>> status = run_status("run")
        >>> status.step, status.total, status.finished
        (3, 3, True)
    """
    return next(_statuses(_log_of(run)))


def watch(
    run: str | os.PathLike[str],
    *,
    measures: Sequence[str] = (),
    every_seconds: float = 2.0,
    once: bool = False,
    console: Console | None = None,
) -> RunStatus:
    """Draw where a run is, on stdout, again and again until its last step is done.

    Where nothing can be redrawn (a file, a pipe) it is drawn once.

    Args:
        run: Its `output_dir`, or its log.jsonl; it need not run any more.
        measures: The measures of its evaluations to show; empty: recall@1 and losses.
        every_seconds: Time between two looks at the log.
        once: Draw once and return.
        console: Where to draw; None: stdout.

    Returns:
        Where the run was when it was last drawn.

    Raises:
        DataError: There is no log, or its evaluations have no such measure.
    """
    console = console or Console()
    statuses = _statuses(_log_of(run))
    status = next(statuses)
    _check_measures(status, measures)
    if once or status.finished or not console.is_terminal:
        console.print(drawn(status, measures, console))
        return status
    with Live(drawn(status, measures, console), console=console, auto_refresh=False) as live:
        while not status.finished:
            time.sleep(every_seconds)
            status = next(statuses)
            live.update(drawn(status, measures, console), refresh=True)
    return status


def _check_measures(status: RunStatus, measures: Sequence[str]) -> None:
    known = status.measures()
    unknown = next((name for name in measures if name not in known), None)
    if unknown is not None:
        there = f"there are {', '.join(known)}" if known else "there is no evaluation in it yet"
        raise DataError(f"{status.log}: no measure {unknown!r}; {there}")


def _log_of(run: str | os.PathLike[str]) -> Path:
    path = Path(run)
    log = path / "log.jsonl" if path.is_dir() else path
    if not log.is_file():
        raise DataError(
            f"{log}: no such log; name the output_dir of a run, which has one from its first step "
            "on"
        )
    return log


def _statuses(log: Path) -> Iterator[RunStatus]:
    """Where the run is, at each time of asking; only new lines are read."""
    reader = LogReader(log)
    while True:
        content = reader.read()
        age = 0.0
        with suppress(OSError):
            age = max(0.0, time.time() - log.stat().st_mtime)
        yield RunStatus(log, content, age)


# ---------------------------------------------------------------------- drawing


def drawn(status: RunStatus, measures: Sequence[str], console: Console) -> RenderableType:
    """Everything that `watch` shows."""
    bars = _BARS if console.encoding.lower().startswith("utf") else _PLAIN_BARS
    parts: list[RenderableType] = [
        Text(str(status.log.parent), overflow="fold"),
        Text(_progress(status)),
    ]
    if status.content.steps:
        parts += [Text(_rates(status.content.steps)), _losses(status, bars)]
    if status.content.evaluations:
        parts.append(_evaluations(status, measures or _main_measures(status), bars))
    parts += [Text(f"warning: {text}", style="yellow") for _, text in status.content.warnings[-3:]]
    parts += [Text(text) for step, text in status.content.stops if step == status.step]
    if not status.finished and status.age_seconds > QUIET_SECONDS:
        parts.append(
            Text(
                f"nothing new for {duration(status.age_seconds)}: the run may have stopped, or "
                "evaluates",
                style="yellow",
            )
        )
    return Group(*parts)


def _progress(status: RunStatus) -> str:
    if status.total is None:
        return f"step {status.step}"
    if status.finished:
        return f"step {status.step}/{status.total}, finished"
    left = status.seconds_left
    rest = "" if left is None else f", {duration(left)} left"
    return f"step {status.step}/{status.total} ({status.step / status.total:.0%}){rest}"


def _rates(steps: Sequence[StepRecord]) -> str:
    recent = steps[-RECENT:]
    last = steps[-1]
    examples, wait = (
        fmean(getattr(record, name) for record in recent)
        for name in ("examples_per_second", "data_wait_share")
    )
    return (
        f"{fmean(r.seconds for r in recent):.2f} s/step, {examples:,.1f} examples/s, {wait:.0%} "
        f"waiting for data; learning rate {last.learning_rate:.3g}, gradient norm "
        f"{last.gradient_norm:.3g}"
    )


def _losses(status: RunStatus, bars: str) -> Table:
    table = _table("", "last", f"mean of {RECENT}", "")
    for name in _LOSSES:
        if values := status.values(name):
            mean = fmean(values[-RECENT:])
            table.add_row(name, f"{values[-1]:.4f}", f"{mean:.4f}", sparkline(values, bars=bars))
    return table


def _main_measures(status: RunStatus) -> list[str]:
    names = status.measures()
    main = [name for name in names if name.endswith(("recall@1", "_loss"))]
    return main or names[:8]


def _evaluations(status: RunStatus, measures: Iterable[str], bars: str) -> Table:
    records = status.content.evaluations
    table = _table(
        "evaluation", "first", "last", f"after steps {records[0].step} to {records[-1].step}"
    )
    for name in measures:
        values = [record.scores[name] for record in records if name in record.scores]
        row = (f"{values[0]:.4f}", f"{values[-1]:.4f}", sparkline(values, bars=bars))
        table.add_row(escape(name), *row)
    return table


def _table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, header in enumerate(headers):
        table.add_column(header, justify="right" if 0 < number < len(headers) - 1 else "left")
    return table


def sparkline(values: Sequence[float], width: int = CURVE_WIDTH, *, bars: str = _BARS) -> str:
    """The curve of some values in one line, each character the mean of its share of them.

    >>> sparkline([0, 1, 2, 3, 2, 1, 0, 7])
    '▁▂▃▄▃▂▁█'

    Args:
        values: The lowest is the first of `bars`, the highest the last; what is not finite is "!".
        width: Largest number of characters.
        bars: From low to high.
    """
    count = min(width, len(values))
    edges = [number * len(values) // max(count, 1) for number in range(count + 1)]
    means = [fmean(values[a:b]) for a, b in pairwise(edges)]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return "!" * count
    low, high = min(finite), max(finite)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((m - low) * scale)] if math.isfinite(m) else "!" for m in means)


def duration(seconds: float) -> str:
    """Two units at most: 45s, 12m 5s, 3h 20m, 2d 4h."""
    whole = round(seconds)
    for size, unit, smaller, name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // smaller}{name}"
    return f"{whole}s"
