"""Per-block techniques: gradient checkpointing, offloading of saved tensors, compilation.

A block is one layer of the vision tower or of the language model. Masks, positions and image
features reach it as arguments, so nothing here depends on token tries.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from cafe.model import last_layer
from cafe.model.vlm import CAFe

LEAST_BYTES = 1 << 20
"""Smaller tensors cost more to move than they free."""


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The transformer layers inside `module`."""
    return [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]


def enable_gradient_checkpointing(vlm: CAFe) -> None:
    """Keep only the inputs of each block and recompute the rest in the backward pass."""
    with warnings.catch_warnings():
        # Renamed in transformers 5.23; the old name exists in every supported version.
        warnings.simplefilter("ignore", FutureWarning)
        vlm.model.gradient_checkpointing_enable({"use_reentrant": False})


def compile_blocks(vlm: CAFe, backend: str = "inductor") -> None:
    """Compile each block of the language model in place; equal blocks share their code.

    The first steps with a new kind of shape are slow. The whole model is not compiled: where
    features go is decided in Python, and every row length would be another graph. Neither is the
    vision tower: transformers reads its layers' outputs through hooks that the compiler cannot
    trace. The hooks of `last_layer` cannot be traced either, so they are removed first.

    Args:
        vlm: Its language model is compiled.
        backend: What makes code of the traced graphs, as `torch.compile` takes it.
    """
    decoder = vlm.model.get_decoder()
    last_layer.release(decoder)
    for block in blocks_of(decoder):
        block.compile(backend=backend)


def offload_saved_tensors(least_bytes: int = LEAST_BYTES) -> saved_tensors_hooks:
    """A context in which the tensors that autograd saves for the backward are in host memory.

    With `enable_gradient_checkpointing` these are little more than the blocks' inputs. Parameters
    and tensors without gradient (masks, frozen weights) stay where they are. Copies are queued on
    the device's own stream, so only the device waits for them.

    Args:
        least_bytes: Smaller tensors stay on the device.
    """

    def pack(tensor: Tensor) -> Any:
        owner = tensor if tensor._base is None else tensor._base  # a matrix product saves weight.T
        if owner.is_leaf or tensor.nbytes < least_bytes:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
