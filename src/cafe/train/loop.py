"""The loop of a run: step, check, move, tell, save, until the steps are done or it must stop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from cafe.data.quarantine import Quarantine
from cafe.errors import DataError, TrainingError
from cafe.recipes import Recipe
from cafe.train.checkpoints import Checkpoints
from cafe.train.distributed import any_rank, sum_over_ranks
from cafe.train.interrupt import Interrupted, StopRequest
from cafe.train.loader import StepData
from cafe.train.log import Reporter, StepRecord
from cafe.train.optim import rate_share, set_learning_rates, warmup_steps
from cafe.train.sharding import clip_pieces
from cafe.train.state import TrainingState
from cafe.train.step import StepNumbers, TrainingStep
from cafe.train.zero import ZeroOptimizer


@dataclass(frozen=True, slots=True)
class Loop:
    """One run, ready to go.

    step           adds the gradients of a batch
    state          what the run changes, and what a checkpoint holds
    total          optimizer steps of the whole run
    on_step        called after each step, on every rank, before a checkpoint is written
    resume_with    the command that goes on with this run
    """

    recipe: Recipe
    accelerator: Accelerator
    step: TrainingStep
    state: TrainingState
    checkpoints: Checkpoints
    quarantine: Quarantine
    reporter: Reporter
    total: int
    on_step: Callable[[StepRecord], None] | None
    resume_with: str

    def run(self, batches: Iterator[StepData], begin: int) -> None:
        """Do the steps from `begin` (0 at first) to the end, and save after the last.

        Raises Interrupted after SIGINT or SIGTERM, once the state is saved; TrainingError for a
        loss that is not finite, before anything moves; DataError for too many broken records.
        """
        device, optimizer = self.state.device, self.state.optimizer
        every = self.recipe.checkpoint.every_steps or self.total
        with StopRequest() as stop:
            for done in range(begin, self.total):
                started = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - started
                self._set_aside(batch, device)
                optimizer.zero_grad()
                numbers = self.step(batch.chunks)
                norm = self._clip()
                self._check_finite(done + 1, batch, numbers, norm)
                set_learning_rates(optimizer, self._rate_share(done))
                optimizer.step()
                self._tell(done, batch, numbers, norm, started, waited)
                interrupted = any_rank(stop.signal_number is not None, device)
                last = done + 1 == self.total
                if last or interrupted or (done + 1) % every == 0:
                    self.reporter.sync()
                    self.checkpoints.save(self.state, done + 1)
                if interrupted and not last:
                    raise self._interrupted(done + 1, stop.signal_number)

    def _rate_share(self, done: int) -> float:
        """The share of the peak learning rate that the step after `done` takes."""
        schedule = self.recipe.schedule
        warmup = warmup_steps(schedule.warmup, self.total)
        return rate_share(done, steps=self.total, warmup=warmup, kind=schedule.kind)

    def _set_aside(self, batch: StepData, device: torch.device) -> None:
        """Broken examples of all ranks into the quarantine, which every rank keeps alike."""
        if any_rank(bool(batch.rejected), device):
            known = self.quarantine.count
            self.quarantine.add(gather_object(batch.rejected), seen=0)  # seen when they were read
            for item in self.quarantine.rejected[known:]:
                self.reporter.note(f"left out: {item}")
        if not batch.chunks:
            reason = str(batch.rejected[0]) if batch.rejected else "no reason is known"
            raise DataError(f"no example of this run can be used; the first: {reason}")

    def _clip(self) -> float:
        """Clip the gradients to the recipe's global norm; returns the norm that they had."""
        parameters = [p for group in self.state.optimizer.param_groups for p in group["params"]]
        limit = self.recipe.optimizer.max_grad_norm or math.inf
        if self.state.sharded:
            return float(clip_pieces(parameters, limit))
        if isinstance(self.state.optimizer, ZeroOptimizer):
            return self.state.optimizer.norm()  # it clips when it moves
        norm = self.accelerator.clip_grad_norm_(parameters, limit)
        assert norm is not None  # None is that of accelerate's DeepSpeed
        return float(norm)

    def _check_finite(self, step: int, batch: StepData, numbers: StepNumbers, norm: float) -> None:
        finite = torch.isfinite(torch.stack(numbers.chunk_values)).tolist()
        bad = not (all(finite) and math.isfinite(norm) and math.isfinite(numbers.contrastive))
        if not any_rank(bad, self.state.device):
            return
        ids = self._culprits(batch, finite)
        blame = f"for the examples {', '.join(ids)}" if ids else "on another process"
        what = "gradient" if all(finite) else "loss"
        raise TrainingError(
            f"step {step}: the {what} is not finite (contrastive {float(numbers.contrastive):.4g}, "
            f"language {float(numbers.language):.4g}) {blame}; the weights are as they were "
            "before. Look at these examples; if they are in order, lower optimizer.learning_rate "
            "or set precision=fp32"
        )

    @torch.no_grad()
    def _culprits(self, batch: StepData, finite: list[bool]) -> list[str]:
        """Ids of the chunks that are broken by themselves; none if those are on other ranks.

        One broken embedding makes the contrastive loss of the whole batch infinite, and with it
        every chunk's; only looking at each chunk alone tells which it was.
        """
        blamed: list[bool] = []
        for chunk in self.step.rounds(batch.chunks):
            moved = chunk.to(self.state.device)
            with self.step.autocast():
                hidden = self.step.core(moved.rows, moved.vision)
            blamed.append(not bool(torch.isfinite(hidden).all()))
        del blamed[len(batch.chunks) :]
        if not any_rank(any(blamed), self.state.device):  # nothing shows in the forward
            blamed = [all(finite) or not good for good in finite]
        return [
            repr(name)
            for chunk, bad in zip(batch.chunks, blamed, strict=True)
            if bad
            for name in chunk.ids
        ]

    def _tell(
        self,
        done: int,
        batch: StepData,
        numbers: StepNumbers,
        norm: float,
        started: float,
        waited: float,
    ) -> None:
        """Log and show the step that was just done."""
        objective = self.step.objective
        contrastive, language = float(numbers.contrastive), float(numbers.language)
        row_tokens = sum_over_ranks(numbers.row_tokens, self.state.device)
        with torch.no_grad():
            temperature = float(self.step.contrast.temperature())
        seconds = time.perf_counter() - started
        record = StepRecord(
            step=done + 1,
            loss=objective.contrastive_weight * contrastive + objective.language_weight * language,
            contrastive=contrastive,
            language=language,
            gradient_norm=norm,
            learning_rate=self.recipe.optimizer.learning_rate * self._rate_share(done),
            examples_per_second=batch.examples / seconds,
            tokens_per_second=row_tokens / seconds,
            data_wait_share=waited / seconds,
            seconds=seconds,
            temperature=temperature if objective.learn_temperature else None,
        )
        self.reporter.step(record)
        if self.on_step is not None:
            self.on_step(record)

    def _interrupted(self, done: int, number: int | None) -> Interrupted:
        cause = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        return Interrupted(
            f"stopped by {cause} after step {done} of {self.total}; the state is saved in "
            f"{self.checkpoints.folder}. Go on with: {self.resume_with}",
            signal.SIGTERM if number is None else number,
        )
