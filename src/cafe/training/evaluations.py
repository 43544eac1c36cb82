"""When a run is evaluated, what is measured, which evaluation is the best, and when to stop early.

The records of the evaluations are all that there is to remember, and the log has them: a resumed
run reads them there, and goes on as if it had never stopped.
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule

from cafe.data.quarantine import Skipped
from cafe.errors import CafeError, RecipeError
from cafe.evaluation.model_calls import CachedCalls, Calls, DistributedCalls, ModelCalls
from cafe.evaluation.registry import find_task, suite_data, task_names
from cafe.evaluation.task import TaskSetup
from cafe.model.vlm import CAFe
from cafe.precision import ComputePrecision
from cafe.ranks import Rank
from cafe.recipes import Evaluate, Recipe
from cafe.report.views import write_view
from cafe.training.build import build_collator, is_sharded, precision_in_use
from cafe.training.data import TrainingData
from cafe.training.distributed import any_rank, rank, world_size
from cafe.training.evaluation_views import PairedSides, build_view
from cafe.training.held_out import HeldOut
from cafe.training.log import EvaluationRecord, LogReader
from cafe.training.saving import ModelSaver
from cafe.training.validation import (
    EvaluationStopped,
    Validation,
    measure_names,
    untouched,
)
from cafe.types import Scores

_log = logging.getLogger("cafe.training")

DEFAULT_BATCH = 16
"""Number of examples per forward where the recipe has no `batch.chunk`."""

_LESS_IS_BETTER = ("loss", "modality_gap", "alignment", "uniformity", "chair_i", "chair_s", "ece")
_NEITHER = ("effective_rank", "yes_ratio", "evasive", "chance", "vectors_per_image", "probe")


def smaller_is_better(measure: str) -> bool:
    """Whether a smaller value of a measure is the better one.

    Raises:
        RecipeError: Neither is, as of a share of answers that are "yes".
    """
    name = measure.rpartition("@")[0] or measure
    if any(word in name for word in _NEITHER):
        raise RecipeError(
            f"checkpoint.best: {measure} has no better and worse; name another measure, e.g. "
            "image_to_text_recall@1 or language_loss"
        )
    words = name.split("/")
    return any(word.endswith(_LESS_IS_BETTER) for word in words)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One evaluation.

    record    as the log has it
    skipped   the held-out examples that cannot be used
    """

    record: EvaluationRecord
    skipped: list[Skipped]


@dataclass(slots=True)
class Evaluations:
    """The evaluations of one run, on every rank alike.

    recipe      its `evaluate` and `checkpoint.best` are used
    total       number of steps of the run
    device      of the model
    vlm         the model, not wrapped
    validation  measures on held-out examples; None: tasks alone
    precision   of the forwards of tasks
    measured    the context of an evaluation: what it leaves behind
    rank        this process among those that share the work
    records     the evaluations so far
    """

    recipe: Recipe
    total: int
    device: torch.device
    vlm: CAFe
    validation: Validation | None
    precision: ComputePrecision
    measured: Callable[[], AbstractContextManager[object]]
    rank: Rank = field(default_factory=Rank)
    records: list[EvaluationRecord] = field(default_factory=list)
    _last: float = field(default_factory=time.monotonic)

    @property
    def settings(self) -> Evaluate:
        assert self.recipe.evaluate is not None
        return self.recipe.evaluate

    def due(self, step: int) -> bool:
        """Whether to evaluate after this step; the last one always. A collective of all ranks."""
        settings = self.settings
        if any(record.step == step for record in self.records):
            return False
        if step in (0, self.total):
            return True
        if settings.every_steps is not None:
            return step % settings.every_steps == 0
        minutes = (time.monotonic() - self._last) / 60
        ended = self.rank.index == 0 and minutes >= (settings.every_minutes or 0)
        return any_rank(ended, self.device)  # the clock of the first process decides for all

    def run(self, step: int, stopped: Callable[[], bool]) -> Evaluated | None:
        """Measure the model after a step. A collective of all ranks.

        Returns:
            What was measured; None: the run is to stop.

        Raises:
            RecipeError: `checkpoint.best` is not among the measures.
            DataError: A task cannot be run.
        """
        started = time.monotonic()
        scores: Scores = {}
        skipped: list[Skipped] = []
        samples, sides = (), None
        try:
            with self.measured():
                if self.validation is not None:
                    held_out = self.validation.scores(stopped)
                    scores, skipped, sides = held_out.scores, held_out.skipped, held_out.sides
                    samples = self.validation.answers()
                scores |= self._task_scores(stopped)
        except EvaluationStopped:
            return None
        self._check_best(scores)
        record = EvaluationRecord(step, scores, time.monotonic() - started, samples)
        # Decisions follow from the scores, so all processes must have the same to the last bit.
        record = self.rank.share([record] * self.rank.size, list)[0]
        self.records.append(record)
        self._keep_view(step, sides)
        self._last = time.monotonic()
        return Evaluated(record, skipped)

    def _keep_view(self, step: int, sides: PairedSides | None) -> None:
        """Write what people can look at. It is no reason to end a run that it cannot be written."""
        if self.validation is None or self.rank.index != 0:
            return
        view = build_view(step, sides, self.validation.sample_prompts)
        best = self.best
        try:
            write_view(self.recipe.output_dir, view, {0, *([] if best is None else [best.step])})
        except (CafeError, OSError) as error:
            _log.warning("the report will not show the evaluation after step %d: %s", step, error)

    def _task_scores(self, stopped: Callable[[], bool]) -> Scores:
        names = [one for name in self.settings.tasks for one in task_names(name)]
        if not names:
            return {}
        plain: Calls = ModelCalls(self.vlm, precision=self.precision)
        plain = plain if self.rank.size == 1 else DistributedCalls(plain, self.rank)
        cached = CachedCalls(plain, "compress")
        scores: Scores = {}
        for name in names:
            if any_rank(stopped(), self.device):
                raise EvaluationStopped
            data = suite_data(name, self.settings.tasks_data)
            # Generated scenes are few and shared by tasks; a data set may not fit in memory.
            setup = TaskSetup(
                cached if data is None else plain, data, self.settings.tasks_limit, rank=self.rank
            )
            result = find_task(name).run(setup)
            scores |= {f"{name}/{score}": value for score, value in result.scores.items()}
        return scores

    def _check_best(self, scores: Scores) -> None:
        best = self.recipe.checkpoint.best
        if best is not None and best not in scores:
            raise _unknown_measure(best, scores)

    # ------------------------------------------------------------------ best, and patience

    @property
    def best(self) -> EvaluationRecord | None:
        """The best evaluation after a step, the first of equals; None: there is none yet."""
        measure = self.recipe.checkpoint.best
        after = [record for record in self.records if record.step > 0]
        if measure is None or not after:
            return None
        sign = -1.0 if smaller_is_better(measure) else 1.0
        return max(after, key=lambda record: sign * record.scores[measure])

    @property
    def patience(self) -> int | None:
        return self.settings.patience

    @property
    def exhausted(self) -> bool:
        """Whether `evaluate.patience` ends the run."""
        patience, best = self.patience, self.best
        if patience is None or best is None:
            return False
        return sum(record.step > best.step for record in self.records) >= patience

    def summary(self) -> str | None:
        """What to say of the best evaluation at the end; None: nothing is kept."""
        measure, best = self.recipe.checkpoint.best, self.best
        if measure is None or best is None:
            return None
        text = (
            f"the best {measure} is {best.scores[measure]:.4g}, after step {best.step}; that model "
            f"is in {self.recipe.output_dir / 'best'}"
        )
        base = next((record for record in self.records if record.step == 0), None)
        if base is not None:
            before, value = base.scores[measure], best.scores[measure]
            worse = value > before if smaller_is_better(measure) else value < before
            if worse:
                text = f"warning: {text}. Before training it was {before:.4g}, which is better"
        return text

    def shown(self, record: EvaluationRecord) -> list[str]:
        """The measures of a record that a message has room for."""
        best = self.recipe.checkpoint.best
        main = [n for n in record.scores if n.endswith("recall@1") or n.endswith("_loss")]
        chosen = [*([] if best is None else [best]), *main, *record.scores]
        return list(dict.fromkeys(chosen))[: max(4, len(main))]


# ---------------------------------------------------------------------- before the run


def build_evaluations(
    recipe: Recipe,
    data: TrainingData,
    vlm: CAFe,
    accelerator: Accelerator,
    saver: ModelSaver,
    log_path: Path,
) -> Evaluations | None:
    """The evaluations of a run, with those that its log has already; None: it has none.

    A collective of all ranks: only the first one has the log.
    """
    if recipe.evaluate is None:
        return None
    shared, validation = Rank(rank(), world_size()), None
    if data.held_out is not None:
        collator = build_collator(recipe, vlm)
        validation = Validation(
            vlm,
            replace(collator, matching=False, every_token=False, dummy_image=False),
            data.held_out,
            recipe.batch.chunk or DEFAULT_BATCH,
            recipe.evaluate.samples,
            lambda: accelerator.autocast(),
            shared,
            is_sharded(recipe),
        )

    @contextmanager
    def measured() -> Iterator[None]:
        saver.describe_training()  # tasks read the temperature there
        with untouched(vlm, accelerator.device, compiled=recipe.compile):
            yield
        if isinstance(vlm, FSDPModule):
            vlm.reshard()

    earlier = LogReader(log_path).read().evaluations if accelerator.is_main_process else []
    return Evaluations(
        recipe,
        data.steps,
        accelerator.device,
        vlm,
        validation,
        precision_in_use(accelerator),
        measured,
        shared,
        shared.share([earlier] * shared.size, list)[0],
    )


def check_evaluations(recipe: Recipe, held_out: HeldOut | None) -> None:
    """Check what a recipe evaluates, before its model is loaded.

    Raises:
        RecipeError: No such measure, or one that has no better value.
        DataError: No such task, or one whose data are not there.
    """
    if recipe.evaluate is None:
        return
    names = [one for name in recipe.evaluate.tasks for one in task_names(name)]
    for name in names:
        suite_data(name, recipe.evaluate.tasks_data)
    best = recipe.checkpoint.best
    if best is None:
        return
    smaller_is_better(best)
    known = [] if held_out is None else measure_names(held_out.examples)
    # The scores of a task are known once it has run, before the first step.
    if best not in known and not best.startswith(tuple(f"{name}/" for name in names)):
        raise _unknown_measure(best, known)


def _unknown_measure(best: str, known: Iterable[str]) -> RecipeError:
    names: Sequence[str] = list(known)
    close = difflib.get_close_matches(best, names, n=1)
    nearest = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"
    return RecipeError(f"checkpoint.best: nothing measures {best!r}{nearest}")
