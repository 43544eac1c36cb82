"""What each rank of the test of `compat: official` does; a module that spawn can import."""

from __future__ import annotations

from typing import Any

import torch

from cafe.recipes import Objective
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.step import TrainingStep
from helpers.models import build_small_model, in_float64
from helpers.ranks import leave
from helpers.twin import gradients, make_examples


def shares() -> list[list[Any]]:
    """Two ranks of unequal size, so of unequal numbers of labels."""
    examples = make_examples(5)
    return [examples[:2], examples[2:]]


def gradients_of(examples: list[Any], objective: Objective, wrapped: bool = False) -> Any:
    model = in_float64(build_small_model()).train()
    outer: Any = torch.nn.parallel.DistributedDataParallel(model) if wrapped else model
    TrainingStep(outer, model, ContrastiveLoss(objective).double(), objective)(
        [model.collator(examples)]
    )
    return gradients(model)


def worker(rank: int, port: int, out: str, compat: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    objective = Objective(contrastive_weight=0.7, language_weight=1.3, compat=compat)  # type: ignore[arg-type]
    torch.save(gradients_of(shares()[rank], objective, wrapped=True), f"{out}/rank{rank}.pt")
    leave()
