"""The findings of an ablation, as the report uses them.

Scores are fractions in [0, 1]; losses are in nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe.ablation.claims import Claim
from cafe.metrics import Interval

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, slots=True)
class Measured:
    """One score of one arm: the mean over its seeds, and each seed's own value."""

    interval: Interval
    runs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Cloud:
    """Embeddings projected on their two principal axes: images [n, 2] and texts [m, 2]."""

    images: Float[np.ndarray, "n 2"]
    texts: Float[np.ndarray, "m 2"]


@dataclass(frozen=True, slots=True)
class ArmScores:
    """The scores of one arm, or of the base.

    weights   contrastive and language weight; None for the base, which is not trained
    seeds     of its runs; empty for the base
    scores    `<task>/<score>` -> its mean and its value per seed
    seconds   of all training steps, one number per seed
    map       the embeddings of the first seed's model
    variant   it differs from joint in more than the weights
    """

    name: str
    weights: tuple[float, float] | None
    seeds: tuple[int, ...]
    scores: Mapping[str, Measured]
    seconds: tuple[float, ...] = ()
    map: Cloud | None = None
    variant: bool = False


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that the report contains.

    arms         base, language, contrastive, joint, and those of the sweep
    differences  (arm, other) -> score -> arm minus other
    claims       each claim with the difference that decides it (`cafe.ablation.claims`); None if
                 the score was not measured
    test_scenes  number of scenes that were evaluated
    settings     of the ablation, ready for JSON
    packages     name -> version
    seconds      total time: scenes, training and evaluation, over all calls
    command      that generates this report
    """

    arms: tuple[ArmScores, ...]
    differences: Mapping[tuple[str, str], Mapping[str, Interval]]
    claims: tuple[tuple[Claim, Interval | None], ...]
    test_scenes: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    command: str = "cafe ablate"

    def arm(self, name: str) -> ArmScores:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def sweep(self) -> tuple[ArmScores, ...]:
        """The arms with both losses, by contrastive weight."""
        both = [
            a for a in self.arms if a.weights is not None and min(a.weights) > 0 and not a.variant
        ]
        return tuple(sorted(both, key=lambda arm: arm.weights or ()))
