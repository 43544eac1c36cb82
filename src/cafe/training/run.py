"""A recipe becomes a fine-tuned model: build everything, run the loop, save.

What a run leaves in `output_dir`:

    model/             the fine-tuned model, one directory for every tool
    best/              the same of the evaluation with the best value of `checkpoint.best`
    recipe.yaml        the recipe with its defaults; `cafe train` runs it again
    log.jsonl          one line per step (`cafe.training.log`)
    quarantine.jsonl   examples that were skipped, with reasons (`cafe.data.quarantine`)
    index/             positions of samples in the archives of the data, if it has any
    checkpoints/       the newest states of the run, to resume from
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout

from cafe.data.quarantine import Quarantine
from cafe.errors import RecipeError, TrainingError, first_line
from cafe.memory import keep_memory
from cafe.model.checkpoint.locate import locate
from cafe.model.vlm import CAFe
from cafe.precision import described, emulation_warning
from cafe.recipes import Recipe, load_recipe
from cafe.training.build import (
    build_accelerator,
    build_collator,
    build_step,
    is_sharded,
    precision_in_use,
    seed_everything,
    track_numbers,
    track_samples,
    trained_settings,
)
from cafe.training.checkpoints import Checkpoints, clean, complete
from cafe.training.contrastive import no_negatives_warning
from cafe.training.data import TrainingData, load_data
from cafe.training.distributed import lost_contact, rank, world_size
from cafe.training.evaluations import build_evaluations, check_evaluations
from cafe.training.loader import StepData, Steps, check_answers_labelled, step_loader
from cafe.training.log import (
    Reporter,
    RunLog,
    StepRecord,
    read_log,
)
from cafe.training.loop import Loop
from cafe.training.matching import check_matchable
from cafe.training.saving import ModelSaver
from cafe.training.state import config_fingerprint
from cafe.training.stopping import Interrupted
from cafe.training.tuning import load_model


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a finished run produced.

    model_dir   directory of the fine-tuned model
    log_path    log.jsonl
    records     the steps in the log, those before a resume included
    best_dir    directory of the model with the best value of `checkpoint.best`; None: not asked for
    """

    model_dir: Path
    log_path: Path
    records: list[StepRecord]
    best_dir: Path | None = None


def train(
    recipe: Recipe | str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
) -> TrainingResult:
    """Fine-tune a model as a recipe says, and save it as one directory.

    The run draws a progress bar on stderr (`log.progress: false` in the recipe turns it off) and
    sends its messages to the logger `cafe.training`.

    Args:
        recipe: A recipe, or the path of one in YAML.
        overrides: Changes to a recipe that is given by its path, such as
            `"optimizer.learning_rate=2e-5"`.
        resume: Continue from the newest complete checkpoint in `output_dir`; without one, start
            from the beginning. The result equals that of an uninterrupted run bit for bit, on a
            CPU and wherever the device's kernels are deterministic.
        on_step: Called after every step, on every rank, before a checkpoint is written. What it
            raises is passed on unchanged.

    Returns:
        The model's directory and the log of the run.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived; the state is saved.
        TrainingError: A loss is not finite, the disk or memory is full, a data worker was killed,
            or `output_dir` contains another run, or one is being written there.
        RecipeError: A key or value of the recipe is not valid, or does not fit the model.
        DataError: A source cannot be read, or too many of its records cannot be used.
        CheckpointError: The model cannot be loaded, or a checkpoint belongs to another run.
        FamilyError: The model is of an unknown family.

    Example:
        With the images and captions of `cafe data scenes --out scenes --count 8 --seed 3`, and a
        recipe that trains on `scenes/captions.json`:

        >>> from cafe.training.run import train
        >>> result = train("run.yaml", overrides=["schedule.steps=3", "output_dir=run"])
        >>> print(result.model_dir)
        run/model
        >>> [record.step for record in result.records]
        [1, 2, 3]
    """
    recipe = as_recipe(recipe, overrides)
    with _output(recipe.output_dir, resume):
        return _train(recipe, resume, on_step)


def as_recipe(recipe: Recipe | str | os.PathLike[str], overrides: Sequence[str]) -> Recipe:
    """A recipe, or the one at a path with its overrides. Raises RecipeError."""
    if not isinstance(recipe, Recipe):
        return load_recipe(os.fspath(recipe), overrides)
    if overrides:
        raise RecipeError(
            f"overrides {', '.join(overrides)}: they apply to a recipe that is given by its path; "
            "for a Recipe, use load_recipe(path, overrides)"
        )
    return recipe


def _train(
    recipe: Recipe, resume: bool, on_step: Callable[[StepRecord], None] | None
) -> TrainingResult:
    output = recipe.output_dir
    if not torch.cuda.is_available():
        keep_memory()
    accelerator = build_accelerator(recipe)
    main = accelerator.is_main_process
    quarantine = Quarantine(output / "quarantine.jsonl" if main else None, recipe.max_rejected)
    data = load_data(recipe, quarantine, index=output / "index")
    check_evaluations(recipe, data.held_out)

    seed_everything(recipe.seed)
    # A sharded model may be too large for any one device: it is sharded in host memory.
    vlm = load_model(recipe, torch.device("cpu") if is_sharded(recipe) else accelerator.device)
    steps = Steps.of(recipe.batch, data, build_collator(recipe, vlm))
    check_answers_labelled(steps)
    if recipe.objective.match_weight > 0:
        check_matchable(steps)
    step, state = build_step(recipe, vlm, accelerator)
    checkpoints = _checkpoints(recipe, data, vlm, accelerator)
    doubts = checkpoints.doubts() if resume else []
    seed_everything(recipe.seed + rank())  # dropout differs between ranks
    done = checkpoints.restore(state) if resume else 0

    log_path = output / "log.jsonl"
    if main:
        recipe.save(output / "recipe.yaml")
    log = RunLog(log_path, done) if main else None
    reporter = _reporter(recipe, log, accelerator, done, data.steps)
    saver = ModelSaver(vlm, recipe.model, state, data, recipe.objective.contrastive_weight > 0)
    with reporter:
        if recipe.precision == "auto":
            reporter.message(_resolved(accelerator), logging.INFO)
        for warning in (*doubts, *_warnings(recipe, data, quarantine, accelerator.device)):
            reporter.message(warning)
        if resume:
            left = f"resuming after step {done} of {data.steps}"
            status = left if done < data.steps else f"all {data.steps} steps are done"
            reporter.message(status, logging.INFO)
        loop = Loop(
            recipe=recipe,
            accelerator=accelerator,
            step=step,
            state=state,
            checkpoints=checkpoints,
            quarantine=quarantine,
            reporter=reporter,
            total=data.steps,
            on_step=on_step,
            resume_with=f"cafe train {shlex.quote(str(output / 'recipe.yaml'))} --resume",
            evaluations=build_evaluations(recipe, data, vlm, accelerator, saver, log_path),
            saver=saver,
        )
        loop.divergence.replay(read_log(log_path) if main else ())
        with closing(step_loader(steps, done, data.steps, recipe.batch.workers)) as batches:
            _run(loop, batches, done)
    saver.save(output / "model")
    _leave_process_group(accelerator)
    return TrainingResult(output / "model", log_path, read_log(log_path), loop.best_dir)


def _checkpoints(
    recipe: Recipe, data: TrainingData, vlm: CAFe, accelerator: Accelerator
) -> Checkpoints:
    origin = {"the configuration of model": config_fingerprint(locate(recipe.model)), **data.origin}
    return Checkpoints(
        recipe.output_dir / "checkpoints",
        recipe.checkpoint.keep,
        _data_order(recipe, data),
        origin,
        precision_in_use(accelerator),
        trained_settings(recipe, vlm),
    )


def _run(loop: Loop, batches: Iterator[StepData], begin: int) -> None:
    """Run the loop. A lost connection to other processes becomes a message about that."""
    try:
        loop.run(batches, begin)
    except Interrupted:
        _leave_process_group(loop.accelerator)
        raise
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        raise TrainingError(
            f"process {rank()} of {world_size()} ends, because another process of this run ended "
            f"or does not answer ({first_line(error)[:150]}); see the message of that one, then "
            f"resume with: {loop.resume_with}"
        ) from error


@contextmanager
def _output(output: Path, resume: bool) -> Iterator[None]:
    """A context with the folder, for this run alone. An earlier run in it is never replaced."""
    main = int(os.environ.get("RANK", "0")) == 0
    lock = FileLock(output / ".run")
    try:
        output.mkdir(parents=True, exist_ok=True)
        if main:  # a second run would delete what the first has not finished writing
            lock.acquire(blocking=False)
    except Timeout as error:
        raise TrainingError(
            f"output_dir {output}: another process trains into it; wait for its end, or choose "
            "another output_dir"
        ) from error
    except OSError as error:
        raise RecipeError(f"output_dir {output}: cannot be created ({error.strerror})") from error
    try:
        if not resume and (problem := earlier_run(output)) is not None:
            raise TrainingError(problem)
        if main:
            clean(output / "checkpoints")
            clean(output)
        yield
    finally:
        lock.release()


def _resolved(accelerator: Accelerator) -> str:
    """What `precision: auto` is in this run."""
    device = accelerator.device
    where = f"this CPU ({described()})" if device.type == "cpu" else str(device)
    return f"precision: auto is {precision_in_use(accelerator)} on {where}"


def earlier_run(output: Path) -> str | None:
    """What is wrong with an output_dir for a new run: it contains one; None: it does not."""
    if not complete(output / "checkpoints") and not (output / "model").exists():
        return None
    return (
        f"output_dir {output} contains a run already; continue it with --resume, or choose "
        "another output_dir"
    )


def _warnings(
    recipe: Recipe, data: TrainingData, quarantine: Quarantine, device: torch.device
) -> Iterator[str]:
    """The warnings to give before the first step."""
    slow = emulation_warning(device, "set precision=auto, or fp32")
    if recipe.precision == "bf16" and slow is not None:
        yield slow
    if quarantine.count:
        yield f"skipped: {quarantine.count} records, see {quarantine.path}"
    yield from data_warnings(recipe, data)
    if recipe.evaluate is not None and recipe.evaluate.samples and is_sharded(recipe):
        yield "evaluate.samples: a sharded model cannot generate, so there are none"


def data_warnings(recipe: Recipe, data: TrainingData) -> Iterator[str]:
    """What to say of the data before it trains: records that were changed, batches too small."""
    for path, changes in data.changes.items():
        for change, count in changes.items():
            yield f"{path}: {count:,} records with {change}"
    if (warning := no_negatives_warning(recipe, data)) is not None:
        yield warning
    if data.held_out is not None:
        yield from data.held_out.warnings()
    if recipe.batch.examples < world_size():
        yield (
            f"batch.examples is {recipe.batch.examples}, and there are {world_size()} processes: "
            "those without an example only take part in the communication"
        )
    for name, size in zip(data.plan.names, data.plan.sizes, strict=True):
        if size < recipe.batch.examples:
            yield f"{name}: batch size reduced to {size}, as the source has only {size} examples"


def _data_order(recipe: Recipe, data: TrainingData) -> dict[str, Any]:
    """The settings that decide which examples a step has."""
    return {
        "batch.examples": recipe.batch.examples,
        "seed": recipe.seed,
        "the number of examples": list(data.plan.sizes),
        "the weight of the sources": list(data.plan.weights),
        "data.*.groups": [groups is not None for groups in data.plan.groups]
        if any(groups is not None for groups in data.plan.groups)
        else None,  # as in checkpoints of earlier versions
        "evaluate.held_out": recipe.evaluate and recipe.evaluate.held_out,
    }


def _reporter(
    recipe: Recipe, log: RunLog | None, accelerator: Accelerator, done: int, total: int
) -> Reporter:
    return Reporter(
        log,
        done=done,
        total=total,
        every_steps=recipe.log.every_steps,
        bar=recipe.log.progress,
        track=lambda values, step: track_numbers(accelerator.trackers, values, step),
        track_texts=lambda samples, step: track_samples(accelerator.trackers, samples, step),
    )


def _leave_process_group(accelerator: Accelerator) -> None:
    """Close the trackers and leave the process group, once all ranks have finished.

    Gloo's group is left for the end of the process. Destroying it right after a collective can
    hang: its thread waits for Python's lock to free that tensor, while the destroying thread holds
    the lock and waits for that thread. NCCL requires being destroyed.
    """
    accelerator.wait_for_everyone()
    if accelerator.device.type == "cpu":
        for tracker in accelerator.trackers:
            tracker.finish()
    else:
        accelerator.end_training()
