"""Collectives of the training processes; a single process is a world of size one.

Gathering carries no gradient. Every rank computes the whole contrastive loss and keeps the gradient
with respect to its own embeddings, which occur in both rows and columns of the similarity matrix;
that is exact (`cafe.training.step`), and cheaper than a gather with gradient.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

# Messages of gloo and NCCL when the process at the other end is gone; they have no class for it.
_LOST = re.compile(
    r"connection (reset|closed|refused)|broken pipe|socket (error|timeout|closed)|remote process"
    r"|timed out waiting|no route to host|nccl.*(abort|remote|system) ?error",
    re.IGNORECASE,
)


def lost_contact(error: BaseException) -> bool:
    """Whether an error means that another process of the run no longer answers."""
    return world_size() > 1 and (
        isinstance(error, dist.DistNetworkError) or bool(_LOST.search(str(error)))
    )


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(value: int, device: torch.device) -> int:
    """The sum of an integer over all ranks."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.long, device=device)
    dist.all_reduce(total)
    return int(total)


def max_over_ranks(value: int, device: torch.device) -> int:
    """The maximum of an integer over all ranks."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, dtype=torch.long, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def add_over_ranks(value: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """The sum of a tensor over all ranks, without gradient."""
    if world_size() > 1:
        value = value.detach().clone()
        dist.all_reduce(value)
    return value


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank, so that all ranks stop, or save, together."""
    return sum_over_ranks(int(flag), device) > 0


def gather_rows(own: Shaped[Tensor, "rows ..."]) -> list[Shaped[Tensor, "_ ..."]]:
    """The rows of each rank, in rank order; their numbers may differ. No gradient flows."""
    if world_size() == 1:
        return [own]
    counts = torch.zeros(world_size(), dtype=torch.long, device=own.device)
    counts[rank()] = len(own)
    dist.all_reduce(counts)
    longest = int(counts.max())
    padded = own.new_zeros((longest, *own.shape[1:]))
    padded[: len(own)] = own.detach()
    gathered = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(gathered, padded)
    return [rows[: int(n)] for rows, n in zip(gathered, counts, strict=True)]


def gather_around(own: Float[Tensor, "rows dim"]) -> Float[Tensor, "all_rows dim"]:
    """The rows of all ranks, in rank order; gradient flows to this rank's only."""
    gathered = gather_rows(own)
    gathered[rank()] = own
    return torch.cat(gathered)
