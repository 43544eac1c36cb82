"""The training loop: step, check, update, report, evaluate, save, until the last step or a stop."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from cafe.data.quarantine import Quarantine, Skipped
from cafe.errors import CafeError, DataError, TrainingError
from cafe.memory import peak_device_bytes, peak_host_bytes
from cafe.recipes import Recipe
from cafe.training.checkpoints import Checkpoints
from cafe.training.contrastive import StallDetector
from cafe.training.deepspeed import ZeroOptimizer
from cafe.training.distributed import any_rank, max_over_ranks, rank, sum_over_ranks
from cafe.training.divergence import DivergenceDetector, geometry
from cafe.training.evaluations import Evaluations
from cafe.training.loader import StepData
from cafe.training.log import (
    EvaluationRecord,
    Reporter,
    StepRecord,
    further_losses,
    further_values,
)
from cafe.training.optim import rate_share, set_learning_rates, warmup_steps
from cafe.training.saving import ModelSaver, kept_step
from cafe.training.sharding import clip_sharded_grad_norm
from cafe.training.state import TrainingState
from cafe.training.step import StepMetrics, TrainingStep
from cafe.training.stopping import EmergencyCheckpoint, Interrupted, StopRequest


@dataclass(frozen=True, slots=True)
class Loop:
    """One run, ready to start.

    step           accumulates the gradients of a batch
    state          what the run changes and a checkpoint holds
    total          number of optimizer steps of the whole run
    on_step        called after each step, on every rank, before a checkpoint is written
    resume_with    the command that resumes this run
    evaluations    what is measured on the way; None: nothing
    saver          writes the best model
    divergence     watches for signs that the run goes wrong
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
    evaluations: Evaluations | None
    saver: ModelSaver
    divergence: DivergenceDetector = field(default_factory=DivergenceDetector)
    _oversized: list[str] = field(default_factory=list, init=False)
    _unmeasured: list[str] = field(default_factory=list, init=False)

    def run(self, batches: Iterator[StepData], begin: int) -> None:
        """Run the steps from `begin` to the end, and save after the last one.

        Args:
            batches: The data of these steps, in order.
            begin: Number of steps that are done already.

        Raises:
            Interrupted: SIGINT or SIGTERM arrived; the state is saved.
            TrainingError: A loss is not finite (the weights are as before the step), a checkpoint
                cannot be written, or an unforeseen error occurred, with the state saved if it is
                consistent.
            DataError: Too many records cannot be used.
        """
        device, every = self.state.device, self.recipe.checkpoint.every_steps or self.total
        emergency = EmergencyCheckpoint(
            self.checkpoints, self.state, begin, self.total, self.resume_with
        )
        objective = self.recipe.objective
        stall = StallDetector(
            objective.contrastive == "info_nce" and objective.contrastive_weight > 0
        )
        with StopRequest() as stop:
            last = begin == self.total or self._exhausted
            better = self._evaluated(begin, stop, emergency, last=last, saved=True)
            if better and begin > 0:
                self._keep_best()
            for done in range(begin, begin if last else self.total):
                with emergency.saved_on_error():
                    record, pairs = self._run_step(done, batches, emergency)
                    self.reporter.step(record)
                    if (warning := stall.check(record.contrastive, pairs)) is not None:
                        self.reporter.message(warning)
                    for warning in self.divergence.check(record):
                        self.reporter.warning(warning, record.step)
                if self.on_step is not None:
                    self.on_step(record)
                last = done + 1 == self.total
                better = self._evaluated(done + 1, stop, emergency, last=last)
                if self._exhausted and not last:
                    last = True
                    self._report_early_stop(done + 1)
                interrupted = any_rank(stop.signal_number is not None, device)
                if last or interrupted or better or (done + 1) % every == 0:
                    self.reporter.sync()
                    self.checkpoints.save(self.state, done + 1)
                if better:
                    self._keep_best()
                if last:
                    break
                if interrupted:
                    raise self._interrupted(done + 1, stop.signal_number)
        summary = None if self.evaluations is None else self.evaluations.summary()
        if summary is not None:
            warns = summary.startswith("warning")
            self.reporter.message(summary, logging.WARNING if warns else logging.INFO)

    @property
    def best_dir(self) -> Path | None:
        """Where the best model is; None: the recipe keeps none, or there was no evaluation yet."""
        if self.evaluations is None or self.evaluations.best is None:
            return None
        return self.recipe.output_dir / "best"

    def _evaluated(
        self,
        done: int,
        stop: StopRequest,
        emergency: EmergencyCheckpoint,
        *,
        last: bool,
        saved: bool = False,
    ) -> bool:
        """Evaluate if it is due; returns whether the model is to be kept as the best so far.

        A run that is to stop is not kept waiting: its evaluation is made when it resumes.

        Args:
            done: Number of steps that are done.
            stop: Whether the run is to stop.
            emergency: Saves the state if an unforeseen error ends the evaluation.
            last: No step follows.
            saved: The state is on disk.
        """
        evaluations, device = self.evaluations, self.state.device
        if evaluations is None:
            return False
        interrupted = any_rank(stop.signal_number is not None, device)
        if evaluations.due(done) and (last or not interrupted):
            with emergency.saved_on_error(f"the evaluation after step {done}"):
                asked = stop.signal_number is not None  # of before: it is the last step
                try:
                    measured = evaluations.run(
                        done, lambda: stop.signal_number is not None and not asked
                    )
                except CafeError:  # on all ranks; what was trained is not to be lost with it
                    if not saved:
                        self.checkpoints.save(self.state, done)
                    raise
                if measured is not None:
                    shown = evaluations.shown(measured.record)
                    self.reporter.evaluation(measured.record, shown)
                    self._report_unmeasured(measured.skipped)
        best = evaluations.best
        return best is not None and best.step == done and not self._is_kept(best)

    def _is_kept(self, best: EvaluationRecord) -> bool:
        """Whether the directory of the best model is of this evaluation, on rank 0."""
        kept = rank() == 0 and kept_step(self.recipe.output_dir / "best") == best.step
        return any_rank(kept, self.state.device)

    def _keep_best(self) -> None:
        """Write the model; a checkpoint of the same step is there already, so none is ahead."""
        assert self.evaluations is not None
        assert self.evaluations.best is not None
        self.saver.save_best(self.recipe.output_dir / "best", self.evaluations.best)

    @property
    def _exhausted(self) -> bool:
        """Whether `evaluate.patience` ends the run here."""
        return self.evaluations is not None and self.evaluations.exhausted

    def _report_early_stop(self, done: int) -> None:
        assert self.evaluations is not None
        text = (
            f"stopped after step {done} of {self.total}: the last {self.evaluations.patience} "
            f"evaluations have no better {self.recipe.checkpoint.best}"
        )
        self.reporter.stopped(text, done)

    def _report_unmeasured(self, skipped: list[Skipped]) -> None:
        """Say once which held-out examples cannot be used."""
        if skipped and not self._unmeasured:
            self._unmeasured.append(str(skipped[0]))
            self.reporter.message(
                f"{len(skipped)} held-out examples cannot be used and are not measured on; the "
                f"first: {skipped[0]}"
            )

    def _run_step(
        self, done: int, batches: Iterator[StepData], emergency: EmergencyCheckpoint
    ) -> tuple[StepRecord, int]:
        """Run the step after `done`; returns its record and its number of contrastive pairs."""
        optimizer = self.state.optimizer
        started = time.perf_counter()
        batch = next(batches)
        planned = time.perf_counter() - started
        self._check_usable(batch)
        self._report_oversized(batch)
        optimizer.zero_grad()
        metrics = self.step(batch.chunks)
        self._quarantine(batch)
        norm = self._clip()
        self._check_finite(done + 1, batch, metrics, norm)
        set_learning_rates(optimizer, self._rate_share(done))
        with emergency.updating():
            optimizer.step()
        waited = planned + batch.chunks.waited
        return self._record(done, batch, metrics, norm, started, waited), metrics.pairs

    def _rate_share(self, done: int) -> float:
        """The share of the peak learning rate that the step after `done` uses."""
        schedule = self.recipe.schedule
        warmup = warmup_steps(schedule.warmup, self.total)
        return rate_share(done, steps=self.total, warmup=warmup, kind=schedule.kind)

    def _check_usable(self, batch: StepData) -> None:
        """Raises DataError, on every rank, if no example of the run can be used."""
        if not batch.chunks.usable():
            self._quarantine(batch)
            reason = str(batch.skipped[0]) if batch.skipped else "no reason is known"
            raise DataError(f"no example of this run can be used; the first: {reason}")

    def _report_oversized(self, batch: StepData) -> None:
        """Say once that an example alone exceeds the tokens of a chunk."""
        oversized = batch.chunks.plan.oversized
        if oversized is not None and not self._oversized:
            name, tokens = oversized
            self._oversized.append(name)
            self.reporter.message(
                f"batch.chunk_tokens is {self.recipe.batch.chunk_tokens}, and example {name!r} has "
                f"{tokens} tokens: it is a chunk of its own, as others like it will be"
            )

    def _quarantine(self, batch: StepData) -> None:
        """Put the unusable examples of all ranks into the quarantine, on every rank."""
        if any_rank(bool(batch.skipped), self.state.device):
            known = self.quarantine.count
            self.quarantine.add(gather_object(batch.skipped), seen=0)  # seen when they were read
            for item in self.quarantine.skipped[known:]:
                self.reporter.message(f"skipped: {item}")

    def _clip(self) -> float:
        """Clip the gradients to the recipe's global norm; returns their norm before that."""
        parameters = [p for group in self.state.optimizer.param_groups for p in group["params"]]
        limit = self.recipe.optimizer.max_grad_norm or math.inf
        if self.state.sharded:
            return float(clip_sharded_grad_norm(parameters, limit))
        if isinstance(self.state.optimizer, ZeroOptimizer):
            return self.state.optimizer.norm()  # it clips in its own step
        norm = self.accelerator.clip_grad_norm_(parameters, limit)
        assert norm is not None  # accelerate returns None for its own DeepSpeed only
        return float(norm)

    def _check_finite(self, step: int, batch: StepData, metrics: StepMetrics, norm: float) -> None:
        finite = torch.isfinite(torch.stack(metrics.chunk_values)).tolist()
        bad = not (all(finite) and math.isfinite(norm) and math.isfinite(metrics.contrastive))
        if not any_rank(bad, self.state.device):
            return
        ids = self._non_finite_ids(batch, finite)
        where = f"for the examples {', '.join(ids)}" if ids else "on another process"
        what = "gradient" if all(finite) else "loss"
        further = further_losses(metrics, ".4g")
        raise TrainingError(
            f"step {step}: the {what} is not finite (contrastive {float(metrics.contrastive):.4g}, "
            f"language {float(metrics.language):.4g}{further}) {where}; the weights are "
            "as they were before. Look at these examples; if they are fine, lower "
            "optimizer.learning_rate"
            + (" or set precision=fp32" if self.accelerator.mixed_precision == "bf16" else "")
        )

    @torch.no_grad()
    def _non_finite_ids(self, batch: StepData, finite: list[bool]) -> list[str]:
        """Ids of the examples in chunks that are not finite on their own; none if on other ranks.

        One such embedding makes the contrastive loss of the whole batch infinite, and with it the
        loss of every chunk; only a forward of each chunk alone shows which one it was.
        """
        blamed: list[bool] = []
        names: list[tuple[str, ...]] = []
        most = max_over_ranks(len(batch.chunks), self.state.device)
        for chunk in self.step.padded_chunks(batch.chunks, most):
            moved = chunk.to(self.state.device)
            with self.step.autocast():
                hidden = self.step.unwrapped(moved.rows, moved.vision)
            blamed.append(not bool(torch.isfinite(hidden).all()))
            names.append(chunk.ids)
        del blamed[len(batch.chunks) :]
        if not any_rank(any(blamed), self.state.device):  # the forwards are finite
            blamed = [all(finite) or not good for good in finite]
        return [repr(name) for ids, bad in zip(names, blamed, strict=False) if bad for name in ids]

    def _record(
        self,
        done: int,
        batch: StepData,
        metrics: StepMetrics,
        norm: float,
        started: float,
        waited: float,
    ) -> StepRecord:
        """The record of the step that was just done."""
        objective = self.step.objective
        contrastive, language = float(metrics.contrastive), float(metrics.language)
        further = further_values(metrics)
        row_tokens = sum_over_ranks(metrics.row_tokens, self.state.device)
        padding = sum_over_ranks(metrics.padding, self.state.device)
        with torch.no_grad():
            temperature = float(self.step.contrast.temperature())
        seconds = time.perf_counter() - started
        return StepRecord(
            step=done + 1,
            loss=objective.contrastive_weight * contrastive
            + objective.language_weight * language
            + sum(getattr(objective, f"{name}_weight") * (x or 0.0) for name, x in further.items()),
            contrastive=contrastive,
            language=language,
            gradient_norm=norm,
            learning_rate=self.recipe.optimizer.learning_rate * self._rate_share(done),
            examples_per_second=batch.examples / seconds,
            tokens_per_second=row_tokens / seconds,
            data_wait_share=waited / seconds,
            seconds=seconds,
            padding=padding / max(row_tokens, 1),
            temperature=temperature if objective.learn_temperature else None,
            host_bytes=peak_host_bytes(),
            device_bytes=peak_device_bytes(self.state.device),
            total=self.total,
            **further,
            **_geometry(metrics),
        )

    def _interrupted(self, done: int, number: int | None) -> Interrupted:
        cause = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        return Interrupted(
            f"stopped by {cause} after step {done} of {self.total}; the state is saved in "
            f"{self.checkpoints.folder}. Resume with: {self.resume_with}",
            signal.SIGTERM if number is None else number,
        )


def _geometry(metrics: StepMetrics) -> dict[str, float]:
    """That of the batch, by the names of `StepRecord`."""
    measured = None if metrics.sides is None else geometry(*metrics.sides)
    return {} if measured is None else asdict(measured)
