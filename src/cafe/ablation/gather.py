"""Results of all runs → the findings that the report shows, and their numbers as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cafe.ablation.arms import BASE, CONTRASTIVE, JOINT, LANGUAGE, Arm, Run, arms
from cafe.ablation.claims import Claim, questions
from cafe.ablation.combine import Samples, difference_interval, mean_interval, run_samples
from cafe.ablation.findings import ArmScores, Cloud, Findings, Measured
from cafe.evaluation.results import StoredResult, package_versions
from cafe.metrics import Interval
from cafe.precision import resolved_precision
from cafe.recipes import Ablation, Recipe
from cafe.training.build import training_device

PAIRS = ((JOINT, CONTRASTIVE), (JOINT, LANGUAGE), (JOINT, BASE), (LANGUAGE, BASE))
"""The pairs of arms whose differences are reported."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """Results of the base and by run, and the seconds of each run's training steps."""

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
    """Compute means, differences and claims with their intervals.

    Args:
        measured: The results of the base and of every run.
        ablation: What was run.
        common: The recipe that all runs share.
        command: The command that generates the report.
        seconds: Duration of each step of the ablation.

    Returns:
        Everything that the report contains.
    """
    every = arms(ablation, common.objective)
    base = run_samples(measured.base, BASE)
    rows: dict[str, dict[int, Samples]] = {BASE: dict.fromkeys(ablation.seeds, base)}
    for run, results in measured.runs.items():
        rows.setdefault(run.arm.name, {})[run.seed] = run_samples(results, run.name)
    scored = [ArmScores(BASE, None, (), _scores([base]), map=_map(measured.base))]
    scored += [_arm(arm, rows[arm.name], measured) for arm in every]
    return Findings(
        arms=tuple(scored),
        differences={
            (arm, other): {
                score: difference_interval(rows[arm], rows[other], score) for score in base
            }
            for arm, other in (*PAIRS, *((name, JOINT) for name in ablation.variants))
        },
        claims=tuple(
            (c, _claim_difference(c, rows))
            for question in questions(tuple(ablation.variants))
            for c in question.claims
        ),
        test_scenes=ablation.test_scenes,
        settings=_settings(ablation, common),
        packages=package_versions(),
        seconds=sum(seconds.values()),
        command=command,
    )


def numbers(findings: Findings) -> dict[str, Any]:
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
            for arm in findings.arms
        },
        "differences": {f"{a} - {b}": dict(d) for (a, b), d in findings.differences.items()},
        "test_scenes": findings.test_scenes,
        "settings": dict(findings.settings),
        "packages": dict(findings.packages),
        "seconds": round(findings.seconds, 1),
        "command": findings.command,
    }


def _arm(arm: Arm, rows: Mapping[int, Samples], measured: Measurements) -> ArmScores:
    first = Run(arm, arm.seeds[0])
    return ArmScores(
        name=arm.name,
        weights=(arm.contrastive_weight, arm.language_weight),
        variant=arm.variant,
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


def _claim_difference(claim: Claim, rows: Mapping[str, Mapping[int, Samples]]) -> Interval | None:
    arm, other = rows[claim.arm], rows[claim.other]
    measured = (claim.score, arm), (claim.baseline, other)
    if any(score not in next(iter(runs.values())) for score, runs in measured):
        return None
    return difference_interval(
        arm, other, claim.score, scale=claim.scale, other_score=claim.other_score
    )


def _map(results: Sequence[StoredResult]) -> Cloud | None:
    """The map that the task `gap` saved."""
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
        "precision": resolved_precision(common.precision, training_device()),
        "seeds": ablation.seeds,
        "sweep": ablation.sweep,
        "sweep_seeds": ablation.sweep_seeds,
        "train_scenes": ablation.train_scenes,
        "train_questions": ablation.train_questions,
        "test_scenes": ablation.test_scenes,
        "tasks": ablation.tasks,
        "threads": torch.get_num_threads(),
    }
