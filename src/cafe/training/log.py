"""What a run reports: a JSONL log, a progress bar on stderr, messages, and accelerate's trackers.

Messages go to the logger `cafe.training`, so a program decides what becomes of them; the command
line prints them on stderr.

One line of output_dir/log.jsonl:

    {"step": 12, "loss": 2.31, "contrastive": 1.07, "language": 1.24, "gradient_norm": 3.2,
     "learning_rate": 0.0005, "examples_per_second": 41.0, "tokens_per_second": 9300.0,
     "data_wait_share": 0.01, "seconds": 1.56, "padding": 0.03, "total": 1000}

Lines of other kinds stand between these: an evaluation's scores, and a warning.

    {"step": 200, "evaluation": {"image_to_text_recall@1": 0.41, …}, "seconds": 12.5,
     "samples": [{"id": "17", "prompt": "…", "reference": "…", "answer": "…"}]}
    {"step": 812, "warning": "step 812: the loss is 9.1, and the median …"}
    {"step": 900, "stopped": "stopped after step 900 of 1000: the last 5 evaluations …"}
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from cafe.files import replacing, writing
from cafe.progress import can_draw, rich_progress

PLAIN_SECONDS = 30
"""Where no bar can be drawn, seconds between the lines that are printed instead."""

logger = logging.getLogger("cafe.training")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step.

    step                 number of finished steps, this one included
    loss                 weighted sum of all losses
    contrastive          contrastive loss of the whole batch
    language             nats per labelled token of the whole batch
    thought              contrastive loss of the embeddings after a thought; None: not trained
    soft_label                divergence from the soft labels; None when there are none
    match                cross-entropy of the match questions; None when they are not trained
    multi_vector         contrastive loss of the tokens' vectors; None when they are not trained
    temperature          None when it is not learned
    gradient_norm        before clipping
    learning_rate        that of parts without a rate of their own
    examples_per_second  over all ranks
    tokens_per_second    over all ranks, padding included
    data_wait_share      share of the step's time that was spent waiting for the loader
    seconds              duration of the step, without writing checkpoints
    padding              share of the rows' tokens that is padding, over all ranks; None in the logs
                         of earlier versions
    modality_gap, uniformity, effective_rank   geometry of the batch's embeddings
                         (`cafe.training.divergence`); None without pairs
    host_bytes, device_bytes   most memory that the first process has held so far, since it was
                         started; None where it is not known, and in the logs of earlier versions
    total                number of steps of the whole run; None in the logs of earlier versions
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
    padding: float | None = None
    thought: float | None = None
    soft_label: float | None = None
    match: float | None = None
    multi_vector: float | None = None
    temperature: float | None = None
    modality_gap: float | None = None
    uniformity: float | None = None
    effective_rank: float | None = None
    host_bytes: int | None = None
    device_bytes: int | None = None
    total: int | None = None

    def known(self) -> dict[str, float]:
        """Name -> value, without the fields that do not apply."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """What the model answers to a held-out example.

    reference   what the example says
    """

    id: str
    prompt: str
    reference: str
    answer: str


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One evaluation.

    step      number of steps that were done; 0: the base
    scores    measure -> value
    seconds   that it took
    samples   answers of the model
    """

    step: int
    scores: dict[str, float]
    seconds: float
    samples: tuple[SampleAnswer, ...] = ()

    def line(self) -> str:
        """Its line in the log."""
        values: dict[str, Any] = {
            "step": self.step,
            "evaluation": {name: _rounded(value) for name, value in self.scores.items()},
            "seconds": _rounded(self.seconds),
        }
        if self.samples:
            values["samples"] = [asdict(sample) for sample in self.samples]
        return json.dumps(values, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class LogContent:
    """What a log has, of each kind in order.

    warnings   pairs of a step and a text
    stops      the same of early stops; the run may have gone on after one
    """

    steps: list[StepRecord]
    evaluations: list[EvaluationRecord]
    warnings: list[tuple[int, str]]
    stops: list[tuple[int, str]]

    @classmethod
    def empty(cls) -> LogContent:
        return cls([], [], [], [])


def read_log(path: Path) -> list[StepRecord]:
    """The steps of a log, up to the first line that a killed run left half-written."""
    return LogReader(path).read().steps


_STEP_FIELDS = frozenset(f.name for f in fields(StepRecord))


class LogReader:
    """Reads a log as it grows: the first time all of it, then what is new.

    A line that is not complete, or was left half-written, is not read, nor is what comes after it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._content = LogContent.empty()

    def read(self) -> LogContent:
        """Everything so far. A log that a resumed run has written anew is read anew."""
        if not self._path.exists():
            return self._content
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            if self._file != (status.st_dev, status.st_ino) or status.st_size < self._offset:
                self._file, self._offset = (status.st_dev, status.st_ino), 0
                self._content = LogContent.empty()
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n") or parsed_line(line, self._content) is None:
                    break
                self._offset += len(line)
        return self._content


def parsed_line(line: bytes, content: LogContent) -> dict[str, Any] | None:
    """The values of a line, which are added to the content; None: it is none of a log."""
    try:
        values = json.loads(line)
        _take(values, content)
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
    return values


def _take(line: dict[str, Any], content: LogContent) -> None:
    """Add what a line says. Raises TypeError, KeyError or AttributeError for another line."""
    if "evaluation" in line:
        samples = tuple(SampleAnswer(**sample) for sample in line.get("samples", ()))
        record = EvaluationRecord(line["step"], line["evaluation"], line["seconds"], samples)
        content.evaluations.append(record)
    elif "warning" in line:
        content.warnings.append((line["step"], line["warning"]))
    elif "stopped" in line:
        content.stops.append((line["step"], line["stopped"]))
    else:
        content.steps.append(StepRecord(**{k: v for k, v in line.items() if k in _STEP_FIELDS}))


class RunLog:
    """Appends to the log, after removing what came after step `done`, which a resume repeats."""

    def __init__(self, path: Path, done: int) -> None:
        lines: list[dict[str, Any]] = []
        for line in path.read_bytes().splitlines() if path.exists() else ():
            if (values := parsed_line(line, LogContent.empty())) is None:
                break
            lines.append(values)
        kept = [line for line in lines if line["step"] <= done]
        with replacing(path) as rewritten, writing(path):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
            rewritten.write_text(text, encoding="utf-8")
        self._path = path
        with writing(path):
            self._file = path.open("a", encoding="utf-8")

    def append(self, record: StepRecord) -> None:
        """Write one line. Raises OSError, and the loop saves the state."""
        self.write(_line(record))

    def write(self, line: str) -> None:
        """Write a line, its end included. Raises OSError."""
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            error.filename = str(self._path)
            raise

    def sync(self) -> None:
        """Sync to disk, so that the log is never behind a checkpoint."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # the disk is full, as `append` has said
            self._file.close()


def _line(record: StepRecord) -> str:
    values = {k: _rounded(v) for k, v in record.known().items()}
    return json.dumps(values) + "\n"


def _rounded(value: float) -> float:
    """Seven significant digits, the precision of a float32."""
    return value if isinstance(value, int) else float(f"{value:.7g}")


class Reporter:
    """Reports the steps of a run from one process. Other ranks have no `log` and report nothing."""

    def __init__(
        self,
        log: RunLog | None,
        *,
        done: int,
        total: int,
        every_steps: int = 1,
        bar: bool = True,
        track: Callable[[dict[str, Any], int], None] | None = None,
        track_texts: Callable[[Sequence[SampleAnswer], int], None] | None = None,
    ) -> None:
        self._log, self._track, self._track_texts = log, track, track_texts
        self._total, self._every = total, every_steps
        self._console = Console(stderr=True, quiet=log is None)
        drawn = bar and can_draw(self._console)
        self._plain = bar and not drawn
        self._last_line = time.monotonic()
        self._bar = rich_progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            show=drawn,
            stays=True,
        )
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.refresh()  # in a notebook, stopping does not draw the last numbers
        self._bar.stop()
        if self._log is not None:
            self._log.close()

    def step(self, record: StepRecord) -> None:
        """Log every `every_steps` steps and the last one; show all of them."""
        if self._log is not None and (record.step % self._every == 0 or record.step == self._total):
            self._log.append(record)
            if self._track is not None:
                values = {name: x for name, x in record.known().items() if name != "total"}
                self._track(values, record.step)
        self._bar.update(self._task, completed=record.step, description=_summary(record))
        if self._plain and time.monotonic() - self._last_line > PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(
                escape(f"step {record.step}/{self._total}  {_summary(record)}"),
                highlight=False,
                soft_wrap=True,
            )

    def evaluation(self, record: EvaluationRecord, first: Sequence[str]) -> None:
        """Log, track and show one evaluation; `first` are the measures that a message shows."""
        if self._log is None:
            return
        self._log.write(record.line())
        if self._track is not None:
            numbers = {f"evaluation/{name}": value for name, value in record.scores.items()}
            self._track(numbers, record.step)
        if self._track_texts is not None and record.samples:
            self._track_texts(record.samples, record.step)
        shown = ", ".join(f"{name} {record.scores[name]:.4g}" for name in first)
        self.message(f"evaluation after step {record.step}: {shown}", logging.INFO)

    def warning(self, text: str, step: int) -> None:
        """A message about a step that stays in the log."""
        if self._log is not None:
            line = {"step": step, "warning": text.removeprefix("warning: ")}
            self._log.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.message(text)

    def stopped(self, text: str, step: int) -> None:
        """A message about an early stop that stays in the log."""
        if self._log is not None:
            self._log.write(json.dumps({"step": step, "stopped": text}, ensure_ascii=False) + "\n")
        self.message(text, logging.INFO)

    def message(self, text: str, level: int = logging.WARNING) -> None:
        """Log one message about the run, on the main process only."""
        if self._log is not None:
            logger.log(level, "%s", text)

    def sync(self) -> None:
        if self._log is not None:
            self._log.sync()


FURTHER_LOSSES = ("thought", "soft_label", "match", "multi_vector")
"""The losses that only some runs have, by their names in `StepRecord` and `StepMetrics`, and, with
`_weight`, in a recipe's `objective`."""


def further_values(step: Any) -> dict[str, float | None]:
    """Those of a step, by name; None: it is not trained."""
    losses = ((name, getattr(step, name)) for name in FURTHER_LOSSES)
    return {name: None if loss is None else float(loss) for name, loss in losses}


def further_losses(step: Any, digits: str = ".3f") -> str:
    """Those of a step, as they follow the others in a message."""
    losses = further_values(step).items()
    return "".join(f", {name} {loss:{digits}}" for name, loss in losses if loss is not None)


def _summary(record: StepRecord) -> str:
    further = further_losses(record)
    return (
        f"loss {record.loss:.3f} (contrastive {record.contrastive:.3f}, "
        f"language {record.language:.3f}{further})  {record.examples_per_second:,.1f} examples/s  "
        f"{record.tokens_per_second:,.0f} tokens/s"
    )
