"""Metrics: functions from arrays and strings to numbers. No model, no torch, no files.

Every score is a plain `float`, fractions are in [0, 1], and nothing here draws random numbers
without a seed. `interval` computes the uncertainty of each number.
"""

from __future__ import annotations

from cafe.metrics.answers import (
    CALIBRATION_BINS,
    answer_accuracy,
    calibration_columns,
    calibration_summary,
    consensus_accuracy,
    normalise_answer,
)
from cafe.metrics.captions import bleu_columns, bleu_summary, caption_words, cider_d
from cafe.metrics.geometry import (
    alignment,
    effective_rank,
    modality_gap,
    modality_probe_accuracy,
    project_2d,
    uniformity,
)
from cafe.metrics.hallucination import (
    ABSENT,
    DISQUALIFIED,
    PRESENT,
    THRONE_VOTES,
    chair_columns,
    judge_says_yes,
    object_columns,
    parse_yes_no,
    pope_columns,
    throne_columns,
    throne_summary,
    throne_verdicts,
)
from cafe.metrics.interval import (
    Interval,
    bootstrap_interval,
    interval_over_seeds,
    paired_interval,
    percentile_interval,
    resampled_sums,
)
from cafe.metrics.ranking import (
    TIE_TOLERANCE,
    candidate_scores,
    first_relevant_ranks,
    hit_at_1,
    ndcg_at_k,
    rank_relevances,
    reciprocal_rank_fusion,
    two_way_ranks,
)

__all__ = [
    "ABSENT",
    "CALIBRATION_BINS",
    "DISQUALIFIED",
    "PRESENT",
    "THRONE_VOTES",
    "TIE_TOLERANCE",
    "Interval",
    "alignment",
    "answer_accuracy",
    "bleu_columns",
    "bleu_summary",
    "bootstrap_interval",
    "calibration_columns",
    "calibration_summary",
    "candidate_scores",
    "caption_words",
    "chair_columns",
    "cider_d",
    "consensus_accuracy",
    "effective_rank",
    "first_relevant_ranks",
    "hit_at_1",
    "interval_over_seeds",
    "judge_says_yes",
    "modality_gap",
    "modality_probe_accuracy",
    "ndcg_at_k",
    "normalise_answer",
    "object_columns",
    "paired_interval",
    "parse_yes_no",
    "percentile_interval",
    "pope_columns",
    "project_2d",
    "rank_relevances",
    "reciprocal_rank_fusion",
    "resampled_sums",
    "throne_columns",
    "throne_summary",
    "throne_verdicts",
    "two_way_ranks",
    "uniformity",
]
