"""What a run tells: a JSONL log, a progress bar on stderr, and accelerate's trackers.

One line of output_dir/log.jsonl:

    {"step": 12, "loss": 2.31, "contrastive": 1.07, "language": 1.24, "gradient_norm": 3.2,
     "learning_rate": 0.0005, "examples_per_second": 41.0, "tokens_per_second": 9300.0,
     "data_wait_share": 0.01, "seconds": 1.56}
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 30
"""Where stderr is no terminal, a line comes so often instead of a bar."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step.

    step                 how many steps are done, this one included
    loss                 weighted sum of the next two
    contrastive          of the whole batch
    language             nats per labelled token of the whole batch
    temperature          None when it is not learned
    gradient_norm        before clipping
    learning_rate        of a part without a rate of its own
    examples_per_second  over all ranks, as tokens_per_second, which counts padding too
    data_wait_share      of the step's time, spent waiting for the loader
    seconds              of the step, without writing checkpoints
    """

    step: int
    loss: float
    contrastive: float
    language: float
    gradient_norm: float
    learning_rate: float
    examples_per_second: float
    tokens_per_second: float
    data_wait_share: float
    seconds: float
    temperature: float | None = None

    def known(self) -> dict[str, float]:
        """Name -> value, without what does not apply."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_log(path: Path) -> list[StepRecord]:
    """The records of a log. A line that a killed run left half-written ends it."""
    names = {f.name for f in fields(StepRecord)}
    records: list[StepRecord] = []
    if not path.exists():
        return records
    for line in path.read_bytes().splitlines():
        try:
            values = json.loads(line)
            records.append(StepRecord(**{k: v for k, v in values.items() if k in names}))
        except (ValueError, TypeError, AttributeError):
            break
    return records


class RunLog:
    """Appends to the log; steps after `done`, which a resumed run repeats, are cut off first."""

    def __init__(self, path: Path, done: int) -> None:
        kept = [record for record in read_log(path) if record.step <= done]
        rewritten = path.with_name(f".tmp-{path.name}")
        rewritten.write_text("".join(map(_line, kept)), encoding="utf-8")
        rewritten.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: StepRecord) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """On the disk, so that a checkpoint never knows more steps than the log."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _line(record: StepRecord) -> str:
    values = {k: _rounded(v) for k, v in record.known().items()}
    return json.dumps(values) + "\n"


def _rounded(value: float) -> float:
    """Seven digits: what a float32 holds."""
    return value if isinstance(value, int) else float(f"{value:.7g}")


class Reporter:
    """Tells the steps of a run from one process; on other ranks it is silent (`speaks` False)."""

    def __init__(
        self,
        log: RunLog | None,
        *,
        done: int,
        total: int,
        every_steps: int = 1,
        bar: bool = True,
        track: Callable[[dict[str, Any], int], None] | None = None,
    ) -> None:
        self._log, self._track = log, track
        self._total, self._every = total, every_steps
        self._console = Console(stderr=True, quiet=log is None)
        terminal = self._console.is_terminal
        self._plain = bar and not terminal
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            disable=not (bar and terminal),
        )
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._log is not None:
            self._log.close()

    def step(self, record: StepRecord) -> None:
        """Log every so many steps, and the last; show every one."""
        if self._log is not None and (record.step % self._every == 0 or record.step == self._total):
            self._log.append(record)
            if self._track is not None:
                self._track(record.known(), record.step)
        self._bar.update(self._task, completed=record.step, description=_summary(record))
        if self._plain and time.monotonic() - self._last_line > PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.note(f"step {record.step}/{self._total}  {_summary(record)}")

    def note(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    def sync(self) -> None:
        if self._log is not None:
            self._log.sync()


def _summary(record: StepRecord) -> str:
    return (
        f"loss {record.loss:.3f} (contrastive {record.contrastive:.3f}, "
        f"language {record.language:.3f})  {record.examples_per_second:,.1f} examples/s  "
        f"{record.tokens_per_second:,.0f} tokens/s"
    )
