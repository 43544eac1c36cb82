"""How good it is: arrays and strings become numbers. No model, no torch, no files.

Every score is a plain `float`, fractions are in [0, 1], and nothing here draws random numbers
without a seed. `interval` says how sure each number is.
"""

from __future__ import annotations

from cafe.metrics.answers import answer_accuracy, consensus_accuracy, normalise_answer
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
    chair_scores,
    judge_says_yes,
    object_f1,
    parse_yes_no,
    pope_scores,
    throne_columns,
    throne_scores,
    throne_summary,
    throne_verdicts,
)
from cafe.metrics.interval import (
    Interval,
    bootstrap_interval,
    bootstrap_scores,
    interval_over_seeds,
    paired_interval,
    percentile_interval,
    resampled_sums,
    wilson_interval,
)
from cafe.metrics.ranking import (
    TIE_TOLERANCE,
    candidate_scores,
    first_relevant_ranks,
    hit_at_1,
    ndcg_at_k,
    rank_relevances,
    recall_at_k,
    recalls,
    two_way_ranks,
)

__all__ = [
    "ABSENT",
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
    "bootstrap_scores",
    "candidate_scores",
    "caption_words",
    "chair_scores",
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
    "object_f1",
    "paired_interval",
    "parse_yes_no",
    "percentile_interval",
    "pope_scores",
    "project_2d",
    "rank_relevances",
    "recall_at_k",
    "recalls",
    "resampled_sums",
    "throne_columns",
    "throne_scores",
    "throne_summary",
    "throne_verdicts",
    "two_way_ranks",
    "uniformity",
    "wilson_interval",
]
