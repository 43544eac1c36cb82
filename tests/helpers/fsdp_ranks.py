"""What each rank of the sharded tests does; a module of its own, so that spawn can import it."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from cafe.model.checkpoint.directory import save_checkpoint
from cafe.model.multi_vector import add_token_projection, new_token_projection
from cafe.recipes import Optimizer, Tuning
from cafe.training.checkpoints import Checkpoints
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.optim import build_optimizer, parts_of
from cafe.training.sharding import clip_sharded_grad_norm, full_weights, shard
from cafe.training.state import TrainingState, sharded_tensors, weights_of
from cafe.training.step import TrainingStep
from cafe.training.tuning import adapt
from helpers.models import build_small_model, in_float64
from helpers.ranks import JOINT, examples_of, leave


@dataclasses.dataclass(frozen=True)
class Case:
    """One step.

    chunk           examples; of the 4 and 6 of the two ranks
    checkpointing   recompute activations
    lora            train an adapter
    late            train token vectors
    """

    chunk: int
    checkpointing: bool = False
    lora: bool = False
    late: bool = False


CASES = {
    "direct": Case(6),
    "cached, 2 and 3 chunks": Case(2),
    "direct on one rank, cached on the other": Case(4),
    "gradient checkpointing": Case(2, checkpointing=True),
    "lora": Case(4, lora=True),
    "token vectors": Case(2, late=True),
}


def share(rank: int) -> list[Any]:
    """Of rank 1, the third chunk of 2 has no image and the second no pair."""
    examples = examples_of(rank)
    if rank == 1:
        return _without_pairs(examples, (2, 3))
    return _without_pairs(examples, (6, 7)) if rank == -1 else examples


def _without_pairs(examples: list[Any], which: tuple[int, ...]) -> list[Any]:
    return [
        dataclasses.replace(e, query=None, target=None) if i in which else e
        for i, e in enumerate(examples)
    ]


def step_of(case: Case, rank: int) -> tuple[Any, Any, Any]:
    """The model after one step, sharded unless `rank` is -1, its contrast, and the numbers."""
    model = build_small_model()
    if case.lora:
        adapt(model, Tuning(kind="lora", rank=4, full_parts=["projector"]), "tiny")
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
    if case.late:
        add_token_projection(model.model, new_token_projection(64, 16))
    model = in_float64(model).train()
    if case.checkpointing:
        warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 5.23
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    sharded = rank >= 0
    if sharded:
        shard(model, torch.device("cpu"))
    collator = dataclasses.replace(model.collator, dummy_image=True, every_token=case.late)
    contrast = ContrastiveLoss(JOINT).double()
    objective = JOINT.model_copy(update={"multi_vector_weight": 0.5 * case.late})
    step = TrainingStep(model, model, contrast, objective, sharded=sharded)
    examples = share(rank)
    size = case.chunk if sharded else len(examples)
    numbers = step([collator(examples[i : i + size]) for i in range(0, len(examples), size)])
    return model, contrast, numbers


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """Whole, on rank 0."""
    return full_weights(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    )


def norm_of(model: Any, contrast: Any) -> float:
    """The norm before clipping to a thousandth of it, and a check that it then is that."""
    learned = [p for p in (*model.parameters(), *contrast.parameters()) if p.requires_grad]
    norm = float(clip_sharded_grad_norm(learned, 1e9))
    clip_sharded_grad_norm(learned, norm / 1000)
    assert abs(float(clip_sharded_grad_norm(learned, 1e9)) / norm * 1000 - 1) < 1e-4
    return norm


def restored(rank: int, folder: Path) -> dict[str, bool]:
    """What of a sharded state comes back bit for bit from its pieces, after all was changed."""
    model, contrast, _ = step_of(CASES["direct"], rank)
    optimizer = build_optimizer(parts_of(model), contrast, Optimizer(learning_rate=1e-3), "cpu")
    optimizer.step()
    device = torch.device("cpu")
    state = TrainingState(model.model, contrast, optimizer, device, None, sharded=True)
    checkpoints = Checkpoints(folder / "checkpoints", 1, {})
    checkpoints.save(state, 7)

    def local() -> dict[str, torch.Tensor]:
        return {
            name: (t.to_local() if isinstance(t, DTensor) else t).clone()
            for name, t in sharded_tensors(state).items()
        }

    before = local()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    optimizer.step()
    optimizer.step()
    changed = local()
    step = checkpoints.restore(state)
    after = local()
    return {
        "all were changed": all(
            not torch.equal(before[n], changed[n]) for n in before if before[n].numel()
        ),
        "all came back": all(torch.equal(before[n], after[n]) for n in before),
        "moments are among them": any(n.endswith("exp_avg_sq") for n in before),
        "its step is known": step == 7,
    }


def worker(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    for name, case in CASES.items():
        model, contrast, numbers = step_of(case, rank)
        found = {
            "gradients": gradients_of(model),
            "temperature": contrast.log_temperature.grad.clone(),
            "losses": (numbers.contrastive, numbers.language),
            "counts": (numbers.tokens, numbers.pairs),
            "largest piece": max(p.to_local().numel() for p in model.parameters()),
            "norm": norm_of(model, contrast),
        }
        torch.save(found, f"{out}/{name}-{rank}.pt")
        if case.lora or case.late:  # consolidated, as a run's end writes it
            whole = full_weights(weights_of(model.model))
            if rank == 0:
                save_checkpoint(
                    model.model, model.processor, model.collator, Path(out) / f"saved {name}", whole
                )
    torch.save(restored(rank, Path(out)), f"{out}/restored-{rank}.pt")
    leave()
