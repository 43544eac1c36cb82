"""The training objective: losses as pure functions from tensors to tensors.

No module, no configuration, no ranks. `cafe.model` never imports this package.
"""

from __future__ import annotations

from cafe.objective.contrastive import (
    Directions,
    Rounding,
    clamped_temperature,
    info_nce,
    rounded,
    sigmoid_loss,
)
from cafe.objective.joint import joint_loss
from cafe.objective.language import IGNORE_LABEL, next_token_nll
from cafe.objective.matching import hardest_wrong, known_right, log_odds, match_loss
from cafe.objective.maxsim import TokenVectors, max_sim, max_sim_info_nce
from cafe.objective.official import Compat, contrastive_share, language_count
from cafe.objective.soft_labels import soft_label_loss

__all__ = [
    "IGNORE_LABEL",
    "Compat",
    "Directions",
    "Rounding",
    "TokenVectors",
    "clamped_temperature",
    "contrastive_share",
    "hardest_wrong",
    "info_nce",
    "joint_loss",
    "known_right",
    "language_count",
    "log_odds",
    "match_loss",
    "max_sim",
    "max_sim_info_nce",
    "next_token_nll",
    "rounded",
    "sigmoid_loss",
    "soft_label_loss",
]
