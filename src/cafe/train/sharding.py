"""Fully sharded training (FSDP2): every process holds a piece of each weight, gradient and moment.

A block's weights are gathered for its forward and its backward and let go again; what belongs to no
block (embeddings, norms, projector, head) is one more unit, the root, which stays gathered from
forward to backward, because the language loss reads the head after the forward. Weights are
gathered in float32 and cast by autocast, so a sharded run has the numbers of an unsharded one.

This is torch's `fully_shard`, called directly: accelerate (1.15) applies its FSDP plugin on
accelerators only and trains on CPU without sharding and without a word, so what runs on GPUs could
not be tested where there are none.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cafe.errors import FamilyError
from cafe.model.vlm import CAFe
from cafe.train.blocks import blocks_of
from cafe.train.distributed import add_over_ranks, rank, world_size


def shard(core: CAFe, device: torch.device) -> None:
    """Cut the model into pieces, in place, on `device`; its parameters become DTensors.

    Before the optimizer is built, after everything that changes modules or freezes parameters.
    Raises FamilyError when the model has no blocks that could be gathered one by one.
    """
    blocks = blocks_of(core)
    if not blocks:
        raise FamilyError(
            f"model type {core.family.model_type!r}: has no blocks to shard by; set sharding=none"
        )
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(core, mesh=mesh, reshard_after_forward=False)
    core.model.get_input_embeddings().register_forward_hook(_with_gradient)


def _with_gradient(_module: nn.Module, _inputs: Any, embedded: Tensor) -> None:
    """Let the first block's input always ask for a gradient.

    Beside an adapter the token embedding is frozen, and only pictures' features bring a gradient
    to that input. A block without one sends its gradients to the other ranks later, after the
    root's: a rank whose rows have no picture would send them in another order than the others.
    """
    if torch.is_grad_enabled():
        embedded.requires_grad_(True)


def clip_pieces(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Clip gradients of which some are in pieces to a global norm; returns what it was before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    own = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    everywhere = [g for g in gradients if not isinstance(g, DTensor)]
    device = gradients[0].device
    squares = add_over_ranks(_squares(own, device)) + _squares(everywhere, device)
    norm = squares.sqrt()
    share = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (*own, *everywhere):
        gradient.mul_(share.to(gradient.dtype))
    return norm


def _squares(gradients: list[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), device=device)
    for gradient in gradients:
        total = total + gradient.float().square().sum()
    return total


# ---------------------------------------------------------------------- whole and in pieces


def whole_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put pieces together, in the memory of rank 0's host; other ranks help and get nothing.

    All ranks call this together.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            found[name] = whole.detach().cpu()
    return found


def cut_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which every rank has, in the pieces that `other` is in."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor  # another shape is for the caller's loading to complain of
    on_device = tensor.to(other.device)
    return distribute_tensor(on_device, other.device_mesh, other.placements, src_data_rank=None)


# ---------------------------------------------------------------------- files


def save_pieces(tensors: dict[str, Tensor], folder: Path) -> None:
    """Every rank writes what it has; all call this together. Raises OSError on all if one fails."""
    try:
        save(dict(tensors), checkpoint_id=folder)
    except CheckpointException as error:
        raise OSError(_reason(error)) from error


def load_pieces(tensors: dict[str, Tensor], folder: Path) -> set[str]:
    """Fill those of `tensors` that the folder has, however many ranks wrote it.

    Returns the names that it has and `tensors` has not, or the other way round. Raises ValueError
    for a tensor of another shape.
    """
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata.keys()
    both: dict[str, Any] = {name: tensors[name] for name in tensors if name in saved}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one process needs no group to read
            load(both, checkpoint_id=folder)
    except CheckpointException as error:
        raise ValueError(_reason(error)) from error
    return tensors.keys() ^ saved


def _reason(error: CheckpointException) -> str:
    """The first rank's failure, without the tracebacks of all."""
    failures = [failure for failure, _ in error.failures.values()]
    return " ".join(str(failures[0] if failures else error).split())
