"""The contrastive side of the objective, with the numbers it may learn (temperature, bias)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cafe.objective import clamped_temperature, info_nce, sigmoid_loss
from cafe.recipes import Objective

_SIGMOID_BIAS = -10.0  # SigLIP's start


@dataclass(frozen=True, slots=True)
class Sides:
    """Embeddings that contrast, before normalisation.

    query, target  float [n, d]
    negatives      float [m, d]
    target_ids     int64 [n];  negative_ids  int64 [m]
    """

    query: Tensor
    target: Tensor
    negatives: Tensor
    target_ids: Tensor
    negative_ids: Tensor


class Contrast(nn.Module):
    """Sides -> the contrastive loss that a recipe's objective asks for."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        learned = objective.learn_temperature
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(objective.temperature)), requires_grad=learned
        )
        sigmoid = objective.contrastive == "sigmoid"
        self.bias = nn.Parameter(torch.tensor(_SIGMOID_BIAS), requires_grad=sigmoid)

    def temperature(self) -> Tensor | float:
        if not self.objective.learn_temperature:
            return self.objective.temperature
        return clamped_temperature(self.log_temperature)

    def forward(self, sides: Sides) -> Tensor:
        # The published code takes every other target for a negative, equal ones too.
        masks = self.objective.compat == "none"
        shared = {
            "negatives": sides.negatives if len(sides.negatives) else None,
            "target_ids": sides.target_ids if masks else None,
            "negative_ids": sides.negative_ids if masks and len(sides.negatives) else None,
            "temperature": self.temperature(),
            "dims": self.objective.matryoshka_dims,
        }
        if self.objective.contrastive == "sigmoid":
            return sigmoid_loss(sides.query, sides.target, bias=self.bias, **shared)
        return info_nce(
            sides.query,
            sides.target,
            directions=self.objective.directions,
            hardness=self.objective.hardness,
            **shared,
        )
