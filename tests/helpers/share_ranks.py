"""What each rank of `test_shares.py` does; a module of its own, so that spawn can import it."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from cafe.data.dataset import ExampleSet, ExampleSource
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.data import TrainingData
from cafe.training.loader import StepData, Steps
from cafe.training.sharding import shard
from cafe.training.step import TrainingStep
from cafe.types import Image, user
from helpers.fsdp_ranks import gradients_of
from helpers.models import build_small_model, in_float64
from helpers.ranks import JOINT, examples_of, leave
from helpers.twin import gradients

BATCHES = (1, 3, 5, 9)
CHUNKS = (None, 1, 2, 4)
TOKENS = 300
CASES: list[tuple[int, int | str | None]] = [
    *((b, c) for b, c in itertools.product(BATCHES, CHUNKS) if c is None or c < b),
    (5, f"{TOKENS} tokens"),
    (9, f"{TOKENS} tokens"),
]
"""A chunk of the whole batch, or of more, is the case without chunks."""
SHARDED_CASES: list[tuple[int, int | str | None]] = [
    (1, None),
    (3, None),
    (5, 2),
    (9, 4),
    (9, f"{TOKENS} tokens"),
]
"""Enough for the order of the collectives, which sharding adds."""
STEPS = 2
"""DDP arranges its buckets anew between the first step and the second."""


def training_data(batch: int) -> TrainingData:
    """Ten examples: one has no image and no pair, one more no image, one a broken image."""
    examples = [dataclasses.replace(e, dialogues=e.dialogues[1:]) for e in examples_of(-1)]
    examples[3] = dataclasses.replace(examples[3], query=user(Image(b"no image")))
    examples[4] = dataclasses.replace(examples[4], negatives=(examples[0].target,))
    examples[8] = dataclasses.replace(examples[8], query=None, target=None)
    examples = ExampleSet.build([ExampleSource("all", examples)])
    return TrainingData(examples, examples.plan(batch, seed=0), STEPS)


def cases(sharded: bool) -> list[tuple[int, int | str | None]]:
    """The combinations of batch and chunk that are trained."""
    return SHARDED_CASES if sharded else CASES


def share(model: Any, batch: int, chunk: int | str | None, rank: int, ranks: int) -> list[StepData]:
    """What the rank reads in each step; of its chunks one is kept."""
    collator = dataclasses.replace(model.collator, dummy_image=ranks > 1)
    tokens = TOKENS if isinstance(chunk, str) else None
    size = None if isinstance(chunk, str) else chunk
    steps = Steps(training_data(batch), collator, size, rank, ranks, tokens, keep=1)
    return [steps[step] for step in range(STEPS)]


def found(step: TrainingStep, data: StepData, gradients_of: Any) -> dict[str, Any]:
    """Gradients and numbers of one step."""
    step.unwrapped.zero_grad()
    step.contrast.zero_grad()
    numbers = step(data.chunks)
    temperature = step.contrast.log_temperature.grad
    return {
        "gradients": {name: g.clone() for name, g in gradients_of(step.unwrapped).items()},
        "temperature": torch.zeros(()) if temperature is None else temperature.clone(),
        "losses": (numbers.contrastive, numbers.language),
        "counts": (numbers.tokens, numbers.pairs),
    }


def of_one_process(batch: int) -> list[dict[str, Any]]:
    """Each step, whole, in one chunk."""
    model = in_float64(build_small_model()).train()
    step = TrainingStep(model, model, ContrastiveLoss(JOINT).double(), JOINT)
    return [found(step, data, gradients) for data in share(model, batch, None, 0, 1)]


def worker(rank: int, ranks: int, sharded: bool, out: str) -> None:
    """Every case, in turn; what this rank finds goes to `out`. A rank alone is not wrapped."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out}/group", rank=rank, world_size=ranks
    )
    model = in_float64(build_small_model()).train()
    if sharded:
        shard(model, torch.device("cpu"))
    for batch, chunk in cases(sharded):
        contrast = ContrastiveLoss(JOINT).double()
        step = TrainingStep(model, model, contrast, JOINT, sharded=sharded)
        if ranks > 1 and not sharded:
            outer = DistributedDataParallel(model, broadcast_buffers=False)
            step = dataclasses.replace(step, model=outer, no_sync=outer.no_sync)
        of_rank = gradients_of if sharded else gradients
        results = [found(step, d, of_rank) for d in share(model, batch, chunk, rank, ranks)]
        torch.save(results, f"{out}/{batch}-{chunk}-{rank}.pt")
        step = outer = None
        gc.collect()  # the wrapper's hooks on the model go with it
    leave()
