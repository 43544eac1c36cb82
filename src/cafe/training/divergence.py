"""Signs that a run goes wrong, each said once: spikes, gradients that explode, a collapse.

Everything is compared with the run's own recent past, so no number depends on the model. A loss or
gradient that is not finite ends the run before the weights move (`cafe.training.loop`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import torch

from cafe.errors import DataError
from cafe.metrics import effective_rank, modality_gap, uniformity
from cafe.training.log import StepRecord

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

WINDOW = 50
"""Number of latest steps whose median is the run's recent past."""
LEAST = 20
"""With fewer of them nothing is said: the first steps of a run are unlike its later ones."""
SIDE_ROWS = 128
"""Number of rows of each side of a batch whose geometry is measured: milliseconds at any width."""

_SPIKE_DEVIATIONS, _SPIKE_SHARE = 8.0, 0.5
_EXPLOSION = 10.0
_RISE, _RISE_NATS = 1.5, 0.2
_COLLAPSE = 0.5
_GAUSSIAN = 1.4826  # median absolute deviation -> standard deviation of a normal distribution


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the embeddings of a batch lie on the sphere (`cafe.metrics.geometry`).

    modality_gap    distance of the centroids of queries and targets
    uniformity      of the side where it is larger, hence worse
    effective_rank  of the side where it is smaller, hence worse
    """

    modality_gap: float
    uniformity: float
    effective_rank: float


def geometry(query: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> Geometry | None:
    """That of the first rows of both sides; None of fewer than two pairs, or of zeros."""
    sides = [x[:SIDE_ROWS].detach().to("cpu", torch.float32).numpy() for x in (query, target)]
    if min(map(len, sides)) < 2:
        return None
    try:
        return Geometry(
            modality_gap(*sides),
            max(uniformity(side) for side in sides),
            min(effective_rank(side) for side in sides),
        )
    except DataError:  # a zero has no direction; what is not finite ends the run
        return None


@dataclass(slots=True)
class DivergenceDetector:
    """Watches the steps of a run; `check` returns what to say after each, every sign once."""

    _said: set[str] = field(default_factory=set, init=False)
    _windows: dict[str, deque[float]] = field(default_factory=dict, init=False)
    _best: dict[str, tuple[float, int]] = field(default_factory=dict, init=False)

    def replay(self, records: Iterable[StepRecord]) -> None:
        """Take in the steps before a resume, whose signs were said then."""
        for record in records:
            self.check(record)

    def check(self, record: StepRecord) -> list[str]:
        """The warnings to show after a step."""
        found: list[str] = []
        for sign, text in self._signs(record):
            if sign not in self._said:
                self._said.add(sign)
                found.append(f"warning: step {record.step}: {text}")
        return found

    def _signs(self, record: StepRecord) -> Iterator[tuple[str, str]]:
        past = self._past("loss", record.loss)
        if past is not None:
            middle, deviation = past
            if record.loss > middle + max(
                _SPIKE_DEVIATIONS * deviation, _SPIKE_SHARE * abs(middle)
            ):
                yield (
                    "spike",
                    f"the loss is {record.loss:.3g}, and the median of the {WINDOW} steps before "
                    f"is {middle:.3g}; a lower optimizer.learning_rate, or a longer "
                    "schedule.warmup, usually helps, and a look at the data of this step",
                )
            yield from self._rise(record.step, middle)
        past = self._past("gradient_norm", record.gradient_norm)
        if past is not None and record.gradient_norm > _EXPLOSION * past[0] > 0:
            yield (
                "explosion",
                f"the gradient's norm is {record.gradient_norm:.3g}, and the median of the "
                f"{WINDOW} steps before is {past[0]:.3g}; lower optimizer.learning_rate, or "
                "optimizer.max_grad_norm",
            )
        yield from self._collapse(record)

    def _rise(self, step: int, middle: float) -> Iterator[tuple[str, str]]:
        """A loss that does not come down again, which no single step shows."""
        lowest, when = self._lowest("loss", middle, step)
        if middle > lowest + max((_RISE - 1) * abs(lowest), _RISE_NATS):
            yield (
                "rise",
                f"the median of the loss over {WINDOW} steps has risen to {middle:.3g}, from "
                f"{lowest:.3g} at step {when}; resume from a checkpoint with a lower "
                "optimizer.learning_rate",
            )

    def _collapse(self, record: StepRecord) -> Iterator[tuple[str, str]]:
        """Embeddings that become alike: fewer directions and less spread than there were."""
        if record.effective_rank is None or record.uniformity is None:
            return
        ranks = self._past("effective_rank", record.effective_rank)
        spreads = self._past("uniformity", record.uniformity)
        if ranks is None or spreads is None:
            return
        fewest, _ = self._lowest("effective_rank", -ranks[0], record.step)
        tightest, when = self._lowest("uniformity", spreads[0], record.step)
        directions, spread = -fewest, tightest
        if ranks[0] - 1 < _COLLAPSE * (directions - 1) and spreads[0] > _COLLAPSE * spread:
            yield (
                "collapse",
                f"the embeddings become alike: their effective rank is {ranks[0]:.1f} and was "
                f"{directions:.1f}, their uniformity is {spreads[0]:.2f} and was {spread:.2f} at "
                f"step {when}; lower optimizer.learning_rate, or raise batch.examples",
            )

    def _past(self, name: str, value: float) -> tuple[float, float] | None:
        """Median and deviation of the steps before; None: there are too few. Adds the value."""
        window = self._windows.setdefault(name, deque(maxlen=WINDOW))
        past = None
        if len(window) >= LEAST:
            middle = median(window)
            past = middle, _GAUSSIAN * median(abs(x - middle) for x in window)
        window.append(value)
        return past

    def _lowest(self, name: str, value: float, step: int) -> tuple[float, int]:
        """The lowest of all values so far, and its step."""
        best = self._best.get(name)
        if best is None or value < best[0]:
            best = self._best[name] = (value, step)
        return best
