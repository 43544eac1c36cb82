"""Fully sharded training (FSDP2): each process holds a shard of every weight, gradient and moment.

A block's weights are gathered for its forward and its backward and released again. Modules outside
of the blocks (embeddings, norms, projector, head) are one more unit, the root, which stays gathered
from forward to backward, because the language loss reads the head after the forward. Weights are
gathered in float32 and cast by autocast, so a sharded run computes the same as an unsharded one.

This is torch's `fully_shard`, called directly: accelerate (1.15) applies its FSDP plugin on
accelerators only, and silently trains without sharding on CPUs, so that the code that runs on GPUs
could not be tested without one.
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
from cafe.training.blocks import blocks_of
from cafe.training.distributed import add_over_ranks, rank, world_size


def shard(vlm: CAFe, device: torch.device) -> None:
    """Shard the model in place, on `device`; its parameters become DTensors.

    Call it before the optimizer is built, and after everything that changes modules or freezes
    parameters.

    Raises:
        FamilyError: The model has no blocks that could be gathered one by one.
    """
    blocks = blocks_of(vlm)
    if not blocks:
        raise FamilyError(
            f"model type {vlm.family.model_type!r}: has no blocks to shard by; set sharding=none"
        )
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(vlm, mesh=mesh, reshard_after_forward=False)
    vlm.model.get_input_embeddings().register_forward_hook(_with_gradient)


def _with_gradient(_module: nn.Module, _inputs: Any, embedded: Tensor) -> None:
    """Make the input of the first block always require a gradient.

    With an adapter the token embedding is frozen, and only image features require a gradient at
    that input. A block whose input requires none reduces its gradients after the root's, so a rank
    whose rows have no image would run its collectives in a different order from the others.
    """
    if torch.is_grad_enabled():
        embedded.requires_grad_(True)


def clip_sharded_grad_norm(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Clip gradients, some of them sharded, to a global norm; returns the norm before that."""
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


# ---------------------------------------------------------------------- full and sharded


def full_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The full weights in the host memory of rank 0; other ranks get an empty dictionary.

    A collective of all ranks.
    """
    gathered: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            gathered[name] = full.detach().cpu()
    return gathered


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A full tensor, which every rank has, sharded as `other` is."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor  # loading reports a different shape
    on_device = tensor.to(other.device)
    return distribute_tensor(on_device, other.device_mesh, other.placements, src_data_rank=None)


# ---------------------------------------------------------------------- files


def save_sharded(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write each rank's shards, as a collective. Raises OSError on all ranks if one fails."""
    try:
        save(dict(tensors), checkpoint_id=folder)
    except CheckpointException as error:
        raise OSError(_reason(error)) from error


def load_sharded(tensors: dict[str, Tensor], folder: Path) -> set[str]:
    """Fill `tensors` from a folder that any number of ranks wrote.

    Returns:
        The names that are only in the folder, or only in `tensors`.

    Raises:
        ValueError: A tensor has another shape.
    """
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata.keys()
    both: dict[str, Any] = {name: tensors[name] for name in tensors if name in saved}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a single process needs no group
            load(both, checkpoint_id=folder)
    except CheckpointException as error:
        raise ValueError(_reason(error)) from error
    return tensors.keys() ^ saved


def _reason(error: CheckpointException) -> str:
    """The failure of the first rank, without the tracebacks of all ranks."""
    failures = [failure for failure, _ in error.failures.values()]
    return " ".join(str(failures[0] if failures else error).split())
