"""What is done to a model's blocks, one by one: recomputed, their inputs put away, compiled.

A block is one layer of the tower or of the language model. Masks, positions and pictures' features
reach it as arguments, so nothing here knows of tries.
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
    return [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]


def recompute_blocks(core: CAFe) -> None:
    """Keep each block's inputs only, and compute what is within again in the backward pass."""
    with warnings.catch_warnings():
        # Renamed in transformers 5.23; the old name is in every version that we take.
        warnings.simplefilter("ignore", FutureWarning)
        core.model.gradient_checkpointing_enable({"use_reentrant": False})


def compile_blocks(core: CAFe) -> None:
    """Have torch compile each block of the language model, in place; equal blocks share their code.

    The first steps of each kind of shape take long. Not the whole model: which features stand
    where is Python, and every row length would be another graph. Not the tower: transformers reads
    its layers' outputs by hooks that the compiler cannot see through, as are `last_layer`'s.
    """
    decoder = core.model.get_decoder()
    last_layer.release(decoder)
    for block in blocks_of(decoder):
        block.compile()


def inputs_on_host(least_bytes: int = LEAST_BYTES) -> saved_tensors_hooks:
    """While it is entered, what autograd keeps for the backward pass waits in the host's memory.

    With `recompute_blocks` that is little more than the blocks' inputs. Parameters, and what has no
    gradient (masks, frozen weights), stay where they are. Copies run in the order of the device's
    own work, so nothing waits for them but that work.
    """

    def pack(tensor: Tensor) -> Any:
        owner = tensor if tensor._base is None else tensor._base  # a product keeps weight.T
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
