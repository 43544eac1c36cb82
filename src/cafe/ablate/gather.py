"""Results of all runs -> what the report reads, and the same as one JSON file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cafe.ablate.arms import Arm, Run, arms
from cafe.ablate.combine import Samples, difference_interval, mean_interval, run_samples
from cafe.evaluate.results import StoredResult
from cafe.evaluate.run import package_versions
from cafe.metrics import Interval
from cafe.recipes import Ablation, Recipe
from cafe.report import findings
from cafe.report.claims import QUESTIONS, Claim
from cafe.report.findings import BASE, CONTRASTIVE, JOINT, LANGUAGE, Cloud, Findings, Measured

PAIRS = ((JOINT, CONTRASTIVE), (JOINT, LANGUAGE), (JOINT, BASE), (LANGUAGE, BASE))
"""Whose differences the report has."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """Result files by run, and the seconds of each run's training steps."""

    base: Sequence[StoredResult]
    runs: Mapping[Run, Sequence[StoredResult]]
    seconds: Mapping[Run, float]


def gather(
    measured: Measurements,
    ablation: Ablation,
    common: Recipe,
    command: str,
    seconds: Mapping[str, float],
) -> Findings:
    """Means, differences and claims with their intervals."""
    every = arms(ablation, common.objective)
    base = run_samples(measured.base, BASE)
    rows: dict[str, dict[int, Samples]] = {BASE: dict.fromkeys(ablation.seeds, base)}
    for run, results in measured.runs.items():
        rows.setdefault(run.arm.name, {})[run.seed] = run_samples(results, run.name)
    found = [findings.Arm(BASE, None, (), _scores([base]), map=_map(measured.base))]
    found += [_arm(arm, rows[arm.name], measured) for arm in every]
    return Findings(
        arms=tuple(found),
        differences={
            (arm, other): {
                score: difference_interval(rows[arm], rows[other], score) for score in base
            }
            for arm, other in PAIRS
        },
        claims=tuple((c, _judged(c, rows)) for question in QUESTIONS for c in question.claims),
        test_scenes=ablation.test_scenes,
        settings=_settings(ablation, common),
        packages=package_versions(),
        seconds=sum(seconds.values()),
        command=command,
    )


def numbers(found: Findings) -> dict[str, Any]:
    """Every number of the report, ready for JSON."""
    return {
        "arms": {
            arm.name: {
                "weights": arm.weights,
                "seeds": arm.seeds,
                "training_seconds": [round(s, 1) for s in arm.seconds],
                "scores": {
                    score: {"mean": m.interval.estimate, "interval": m.interval[1:], "runs": m.runs}
                    for score, m in arm.scores.items()
                },
            }
            for arm in found.arms
        },
        "differences": {f"{a} - {b}": dict(d) for (a, b), d in found.differences.items()},
        "test_scenes": found.test_scenes,
        "settings": dict(found.settings),
        "packages": dict(found.packages),
        "seconds": round(found.seconds, 1),
        "command": found.command,
    }


def _arm(arm: Arm, rows: Mapping[int, Samples], measured: Measurements) -> findings.Arm:
    first = Run(arm, arm.seeds[0])
    return findings.Arm(
        name=arm.name,
        weights=(arm.contrastive_weight, arm.language_weight),
        seeds=arm.seeds,
        scores=_scores([rows[seed] for seed in arm.seeds]),
        seconds=tuple(measured.seconds[Run(arm, seed)] for seed in arm.seeds),
        map=_map(measured.runs[first]),
    )


def _scores(runs: Sequence[Samples]) -> dict[str, Measured]:
    return {
        score: Measured(mean_interval(runs, score), tuple(float(run[score][0]) for run in runs))
        for score in runs[0]
    }


def _judged(claim: Claim, rows: Mapping[str, Mapping[int, Samples]]) -> Interval | None:
    arm, other = rows[claim.arm], rows[claim.other]
    if claim.score not in next(iter(arm.values())):
        return None
    return difference_interval(arm, other, claim.score, scale=claim.scale)


def _map(results: Sequence[StoredResult]) -> Cloud | None:
    """What the task `gap` kept."""
    details = next((r.record["details"] for r in results if r.task == "gap"), None)
    if details is None:
        return None
    return Cloud(*(np.array(details[f"map/{side}"]) for side in ("image", "text")))


def _settings(ablation: Ablation, common: Recipe) -> dict[str, Any]:
    return {
        "recipe": ablation.recipe,
        "model": common.model,
        "steps": common.schedule.steps,
        "batch": common.batch.examples,
        "chunk": common.batch.chunk,
        "learning_rate": common.optimizer.learning_rate,
        "schedule": common.schedule.kind,
        "warmup": common.schedule.warmup,
        "temperature": common.objective.temperature,
        "precision": common.precision,
        "seeds": ablation.seeds,
        "sweep": ablation.sweep,
        "sweep_seeds": ablation.sweep_seeds,
        "train_scenes": ablation.train_scenes,
        "train_questions": ablation.train_questions,
        "test_scenes": ablation.test_scenes,
        "tasks": ablation.tasks,
        "threads": torch.get_num_threads(),
    }
