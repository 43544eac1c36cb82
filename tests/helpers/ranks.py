"""What each rank of the distributed test does; a module of its own, so that spawn can import it."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import torch

from cafe.model.multi_vector import add_token_projection, new_token_projection
from cafe.recipes import Objective
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.matching import Matcher
from cafe.training.step import TrainingStep
from cafe.types import thought_about, user
from helpers.models import build_small_model, in_float64, with_latent_mean
from helpers.twin import gradients, make_examples

JOINT = Objective(contrastive_weight=0.7, language_weight=1.3, learn_temperature=True)


def examples_of(rank: int) -> list[Any]:
    """Ten examples; the last two of rank 1 have no image. The ranks' shares differ in size."""
    examples = make_examples(7)
    texts = [
        dataclasses.replace(
            e,
            query=e.target,
            target=(dataclasses.replace(e.target[0], content=(f"again {e.id}",)),),
            dialogues=tuple(
                (dataclasses.replace(q, content=q.content[1:]), a) for q, a in e.dialogues
            ),
        )
        for e in make_examples(3, seed=1)
    ]
    everything = examples + texts
    return {0: everything[:4], 1: everything[4:], -1: everything}[rank]


def scored(example: Any) -> Any:
    """With hard negatives and a teacher's scores, each third pair without."""
    number = int(example.id.rpartition("-")[2])
    wrong = [user(f"no cat {number}{letter}") for letter in "ab"[: number % 3]]
    scores = (1.0, *(0.7 - i - number / 5 for i in range(len(wrong))))
    return dataclasses.replace(example, negatives=tuple(wrong), scores=scores if wrong else None)


def step_of(
    rank: int,
    chunk: int,
    wrapped: bool,
    match_weight: float = 0.0,
    thought_weight: float = 0.0,
    multi_vector_weight: float = 0.0,
    teacher: str | None = None,
    latent: int = 0,
) -> tuple[Any, Any, Any]:
    model = build_small_model()
    if latent:
        model = with_latent_mean(model, latent)
    model = in_float64(model).train()
    if multi_vector_weight:
        add_token_projection(model.model, new_token_projection(64, 16))
    matching = match_weight > 0
    collator = dataclasses.replace(
        model.collator, dummy_image=True, matching=matching, every_token=multi_vector_weight > 0
    )
    weights: dict[str, Any] = {
        "match_weight": match_weight,
        "thought_weight": thought_weight,
        "multi_vector_weight": multi_vector_weight,
    }
    if teacher is not None:
        weights |= {"soft_label_weight": 0.8, "soft_labels": teacher}
    objective = JOINT.model_copy(update=weights)
    contrast = ContrastiveLoss(objective).double()
    outer: Any = torch.nn.parallel.DistributedDataParallel(model) if wrapped else model
    step = TrainingStep(
        outer,
        model,
        contrast,
        objective,
        matcher=Matcher.of(model) if matching else None,
        **({"no_sync": outer.no_sync} if wrapped else {}),
    )
    examples = examples_of(rank)
    if teacher == "scores":
        examples = [scored(e) for e in examples]
    if thought_weight:
        examples = [
            e
            if e.query is None or e.id.endswith("2")
            else dataclasses.replace(e, query_thought=thought_about(e.query, "a red cat"))
            for e in examples
        ]
    size = chunk or len(examples)
    parts = [collator(examples[i : i + size]) for i in range(0, len(examples), size)]
    numbers = step(parts)
    return model, contrast, numbers


def worker(
    rank: int,
    port: int,
    chunk: int,
    out: str,
    match: float = 0.0,
    thought: float = 0.0,
    multi_vector: float = 0.0,
    teacher: str | None = None,
    latent: int = 0,
) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    model, contrast, numbers = step_of(
        rank, chunk, True, match, thought, multi_vector, teacher, latent
    )
    torch.save(
        {
            "gradients": gradients(model),
            "temperature": contrast.log_temperature.grad,
            "match": numbers.match,
            "thought": numbers.thought,
            "multi_vector": numbers.multi_vector,
            "soft_label": numbers.soft_label,
            "numbers": (numbers.contrastive, numbers.language, numbers.tokens, numbers.pairs),
        },
        f"{out}/rank{rank}.pt",
    )
    leave()


def leave() -> None:
    """End this rank, its work being saved, when no rank works any more.

    At once: gloo's threads, and a process that ends in order, now and then abort one another.
    """
    torch.distributed.barrier()
    time.sleep(0.5)  # the other may still read what ends its barrier
    os._exit(0)
