"""Findings with numbers that are easy to check, for tests of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cafe.ablation.claims import QUESTIONS
from cafe.ablation.findings import ArmScores, Cloud, Findings, Measured
from cafe.ablation.report import ROWS
from cafe.metrics import Interval

PAIRS = (("joint", "contrastive"), ("joint", "language"), ("joint", "base"), ("language", "base"))
SETTINGS = {"train_scenes": 3000, "steps": 120, "batch": 64, "threads": 2, "seeds": [0, 1, 2]}
SCORES = tuple(score for rows in ROWS.values() for score in rows)
WEIGHTS = {
    "base": None,
    "language": (0.0, 1.0),
    "contrastive": (1.0, 0.0),
    "joint": (1.0, 1.0),
    "joint-3": (3.0, 1.0),
    "joint-0.1": (0.1, 1.0),
}


def measured(value: float, seeds: int) -> Measured:
    return Measured(
        Interval(value, value - 0.02, value + 0.02),
        tuple(value + 0.01 * (i - 1) for i in range(max(1, seeds))),
    )


def made(
    values: Mapping[str, float] | None = None,
    claims: Mapping[tuple[str, str, str], Interval] | None = None,
    **changes: Any,
) -> Findings:
    """Every score of an arm is the same number; every difference is 0.1 [0.05, 0.15].

    values   arm -> its number
    claims   (score, arm, other) -> the difference that answers the claim
    """
    numbers = dict.fromkeys(WEIGHTS, 0.5) | dict(values or {})
    rng = np.random.default_rng(0)
    arms = []
    for name, weights in WEIGHTS.items():
        seeds = () if weights is None else (0, 1, 2) if "-" not in name else (0,)
        cloud = Cloud(rng.normal(size=(40, 2)) + 2, rng.normal(size=(40, 2)))
        scores = {score: measured(numbers[name], len(seeds)) for score in SCORES}
        seconds = tuple(100.0 + 10 * i for i in range(len(seeds)))
        arms.append(ArmScores(name, weights, seeds, scores, seconds, cloud))
    usual = Interval(0.1, 0.05, 0.15)
    known = dict(claims or {})
    fields: dict[str, Any] = {
        "arms": tuple(arms),
        "differences": {pair: dict.fromkeys(SCORES, usual) for pair in PAIRS},
        "claims": tuple(
            (c, known.get((c.score, c.arm, c.other), usual)) for q in QUESTIONS for c in q.claims
        ),
        "test_scenes": 250,
        "settings": SETTINGS,
        "packages": {"torch": "2.13.0"},
        "seconds": 1800.0,
        "command": "cafe ablate --report results.md",
    }
    return Findings(**(fields | changes))
