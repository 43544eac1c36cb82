"""A recipe becomes a fine-tuned model: build everything, run the loop, save.

What a run leaves in `output_dir`:

    model/             the fine-tuned model, one directory for every tool
    recipe.yaml        the resolved recipe; `cafe train` runs it again
    log.jsonl          one line per step (`cafe.train.log`)
    quarantine.jsonl   examples that were left out, with reasons (`cafe.data.quarantine`)
    index/             where samples stand in the archives of the data, if it has any
    checkpoints/       the newest states of the run, to resume from
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from cafe.data.quarantine import Quarantine
from cafe.errors import RecipeError, TrainingError
from cafe.memory import keep_memory
from cafe.model.adapter import adapter_of
from cafe.model.checkpoint import save_checkpoint, weights_dtype
from cafe.model.location import first_line
from cafe.model.rerank import TEMPERATURE_KEY
from cafe.model.vlm import CAFe
from cafe.recipes import Recipe
from cafe.train.adapt import load_core
from cafe.train.build import (
    build_accelerator,
    build_collator,
    build_step,
    is_sharded,
    seed_everything,
)
from cafe.train.checkpoints import (
    WRITE_ERRORS,
    Checkpoints,
    clean,
    complete,
    whole_directory,
)
from cafe.train.distributed import any_rank, lost_contact, rank, world_size
from cafe.train.examples import TrainingData, load_data
from cafe.train.interrupt import Interrupted
from cafe.train.loader import StepData, Steps, step_loader
from cafe.train.log import Reporter, RunLog, StepRecord, read_log
from cafe.train.loop import Loop
from cafe.train.sharding import whole_weights
from cafe.train.state import weights_of


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished run left behind.

    model_dir   the fine-tuned model
    log_path    log.jsonl
    records     what the log holds, steps before a resume included
    """

    model_dir: Path
    log_path: Path
    records: list[StepRecord]


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
) -> TrainResult:
    """Run `recipe` to its end.

    resume    go on from the newest complete checkpoint in `output_dir`; without one, begin. The
              result is the same bit for bit as that of a run that never stopped, on a CPU and
              wherever the device's kernels are deterministic
    on_step   called after every step, on every rank, before a checkpoint is written

    Raises Interrupted (SIGINT, SIGTERM; the state is saved), TrainingError (loss not finite, disk
    full, `output_dir` holds another run), and the errors of data, recipe and model.
    """
    output = recipe.output_dir
    _prepare_output(output, resume)
    if not torch.cuda.is_available():
        keep_memory()
    accelerator = build_accelerator(recipe)
    main = accelerator.is_main_process
    quarantine = Quarantine(output / "quarantine.jsonl" if main else None, recipe.max_rejected)
    data = load_data(recipe, quarantine)

    seed_everything(recipe.seed)
    # A sharded model may be too large for any one device: it is cut in the host's memory.
    core = load_core(recipe, torch.device("cpu") if is_sharded(recipe) else accelerator.device)
    steps = Steps(data, build_collator(recipe, core), recipe.batch.chunk, rank(), world_size())
    step, state = build_step(recipe, core, accelerator)
    checkpoints = Checkpoints(output / "checkpoints", recipe.checkpoint.keep, _order(recipe, data))
    seed_everything(recipe.seed + rank())  # dropout falls differently on each rank
    done = checkpoints.restore(state) if resume else 0

    log_path = output / "log.jsonl"
    if main:
        recipe.save(output / "recipe.yaml")
    log = RunLog(log_path, done) if main else None
    reporter = _reporter(recipe, log, accelerator, done, data.steps)
    with reporter:
        for note in _first_notes(recipe, data, quarantine, done if resume else None):
            reporter.note(note)
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
        )
        _run(loop, step_loader(steps, done, data.steps, recipe.batch.workers), done)
    if recipe.objective.contrastive_weight > 0:  # reranking weighs the embeddings by it
        learned = state.contrast.temperature()
        number = learned.item() if isinstance(learned, torch.Tensor) else learned
        setattr(core.model.config, TEMPERATURE_KEY, number)
    _save_model(core, recipe.model, output / "model", sharded=state.sharded)
    _part(accelerator)
    return TrainResult(output / "model", log_path, read_log(log_path))


def _run(loop: Loop, batches: Iterator[StepData], begin: int) -> None:
    """The loop's steps; a process that loses the others says so instead of what gloo says."""
    try:
        loop.run(batches, begin)
    except Interrupted:
        _part(loop.accelerator)
        raise
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        raise TrainingError(
            f"process {rank()} of {world_size()} ends, because another one of this run ended or "
            f"does not answer ({first_line(error)[:150]}); read what that one said, then go on "
            f"with: {loop.resume_with}"
        ) from error


def _prepare_output(output: Path, resume: bool) -> None:
    """Make the folder; a new run never writes over an old one."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"output_dir {output}: cannot be made ({error.strerror})") from error
    checkpoints = output / "checkpoints"
    if not resume and (complete(checkpoints) or (output / "model").exists()):
        raise TrainingError(
            f"output_dir {output} holds a run already; go on with it by --resume, or give another "
            "output_dir"
        )
    if int(os.environ.get("RANK", "0")) == 0:
        clean(checkpoints)
        clean(output)


def _first_notes(
    recipe: Recipe, data: TrainingData, quarantine: Quarantine, resumed: int | None
) -> Iterator[str]:
    """What is to be known before the first step. resumed: the steps that are done, if it is so."""
    if quarantine.count:
        yield f"left out: {quarantine.count} records, see {quarantine.path}"
    for name, size in zip(data.plan.names, data.plan.sizes, strict=True):
        if size < recipe.batch.examples:
            yield f"{name}: its batches have {size} examples, for it has no more"
    if resumed is not None:
        going = f"going on after step {resumed} of {data.steps}"
        yield going if resumed < data.steps else f"all {data.steps} steps are done"


def _order(recipe: Recipe, data: TrainingData) -> dict[str, Any]:
    """What decides which examples a step has."""
    return {
        "batch.examples": recipe.batch.examples,
        "seed": recipe.seed,
        "the number of examples": list(data.plan.sizes),
        "the weight of the sources": list(data.plan.weights),
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
        track=lambda values, step: accelerator.log(values, step=step),
    )


def _save_model(core: CAFe, base: str, target: Path, *, sharded: bool) -> None:
    """Write the model whole or not at all, in the type of the base's own weights; rank 0 does it.

    Training keeps its weights in float32 (the checkpoints have those); a base that came in bf16
    leaves in bf16, half the size, as its users load it. An adapter is small and stays in float32.
    """
    adapted = adapter_of(core.model) is not None
    dtype = torch.float32 if adapted else weights_dtype(base)
    weights = whole_weights(weights_of(core.model)) if sharded else None
    failure: Exception | None = None
    if rank() == 0:
        try:
            with whole_directory(target) as unfinished:
                if weights is None:
                    if not adapted:  # weights in 4 bits cannot be cast, nor are they saved
                        core.model.to(dtype)
                    core.save_pretrained(unfinished)
                else:
                    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
                    save_checkpoint(core.model, core.processor, core.collator, unfinished, weights)
        except WRITE_ERRORS as error:
            failure = error
    if any_rank(failure is not None, core.device):
        reason = "another rank failed" if failure is None else " ".join(str(failure).split())
        raise TrainingError(
            f"the model {target} cannot be written ({reason}); the last checkpoint is whole. Free "
            "space on that disk, then go on with --resume"
        ) from failure


def _part(accelerator: Accelerator) -> None:
    """Close trackers and leave the other ranks, at a time when none of them still works.

    Gloo's group is left to the process's end. Destroying it right after a collective can hang:
    its thread waits for Python's lock to free that tensor, and the destroying thread holds the
    lock and waits for its end. NCCL asks to be destroyed.
    """
    accelerator.wait_for_everyone()
    if accelerator.device.type == "cpu":
        for tracker in accelerator.trackers:
            tracker.finish()
    else:
        accelerator.end_training()
