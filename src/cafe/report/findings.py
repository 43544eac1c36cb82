"""What an ablation found, as its report reads it. Fractions in [0, 1], losses in nats per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe.metrics import Interval

if TYPE_CHECKING:
    from jaxtyping import Float

    from cafe.report.claims import Claim

BASE, LANGUAGE, CONTRASTIVE, JOINT = "base", "language", "contrastive", "joint"


@dataclass(frozen=True, slots=True)
class Measured:
    """One score of one arm: the mean over its seeds, and each seed's own value."""

    interval: Interval
    runs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Cloud:
    """Embeddings on their two principal axes: pictures [n, 2] and texts [m, 2]."""

    images: Float[np.ndarray, "n 2"]
    texts: Float[np.ndarray, "m 2"]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of training.

    weights   contrastive and language; None for the base, which is not trained
    seeds     of its runs; none for the base
    scores    `<task>/<score>` -> what was measured
    seconds   of all training steps, one number a seed
    map       of the first seed's embeddings
    """

    name: str
    weights: tuple[float, float] | None
    seeds: tuple[int, ...]
    scores: Mapping[str, Measured]
    seconds: tuple[float, ...] = ()
    map: Cloud | None = None


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that the report says.

    arms         base, language, contrastive, joint, and the sweep's
    differences  (arm, other) -> score -> arm minus other
    claims       what was asked, with the difference that answers it (`cafe.report.claims`); None
                 where the score was not measured
    test_scenes  how many were measured
    settings     of the run, ready for JSON
    packages     their versions
    seconds      of everything: scenes, training and measuring, over all calls
    command      that makes this report
    """

    arms: tuple[Arm, ...]
    differences: Mapping[tuple[str, str], Mapping[str, Interval]]
    claims: tuple[tuple[Claim, Interval | None], ...]
    test_scenes: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    command: str = "cafe ablate"

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def sweep(self) -> tuple[Arm, ...]:
        """The arms with both losses, by contrastive weight."""
        both = [a for a in self.arms if a.weights is not None and min(a.weights) > 0]
        return tuple(sorted(both, key=lambda arm: arm.weights or ()))
