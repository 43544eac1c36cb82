"""Reranking: what the embedding and the answer say of a candidate, added.

Contrastive training makes cosine / temperature the log of how much likelier a candidate is beside
this query than by itself, up to a constant (van den Oord et al., arXiv 1807.03748, §2.3). The
log-odds of "yes" to the match question are a second witness. Taken as independent, and with all
candidates alike beforehand, they give by Bayes' rule

    P(candidate i is the one meant) = softmax_i( cosine_i / temperature + log P(yes) / P(no) )

The order by P(yes) alone throws the first witness away, and the match question was trained on one
picture at a time: nothing made its answers comparable between pictures.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cafe.errors import CheckpointError

if TYPE_CHECKING:
    from jaxtyping import Float

DEFAULT_TEMPERATURE = 0.05
"""Of a model that says nothing of its training: the published scale of 20."""

TEMPERATURE_KEY = "contrastive_temperature"
"""Of config.json. (transformers takes "temperature" for a setting of generation.)"""


class Reranked(NamedTuple):
    """What is known of each candidate, in the candidates' order.

    match      float32 [n]: the probability of "yes" to the match question, each by itself
    posterior  float64 [n], sum 1: the probability that this candidate is the one meant, if one is
    """

    match: np.ndarray
    posterior: np.ndarray


def reranked(
    cosines: Float[np.ndarray, " n"], log_odds: Float[np.ndarray, " n"], temperature: float
) -> Reranked:
    """Both witnesses together.

    cosines    of the query's embedding with each candidate's
    log_odds   log P(yes) / P(no) of each match question
    Raises ValueError for two different lengths.
    """
    if cosines.shape != log_odds.shape or cosines.ndim != 1:
        raise ValueError(f"cosines {cosines.shape} and log-odds {log_odds.shape}: use [n] and [n]")
    odds = log_odds.astype(np.float64)
    match = (0.5 * (1 + np.tanh(odds / 2))).astype(np.float32)  # the sigmoid, without overflow
    if len(odds) == 0:
        return Reranked(match, odds)
    return Reranked(match, softmax(cosines.astype(np.float64) / temperature + odds))


def softmax(evidence: Float[np.ndarray, " n"]) -> np.ndarray:
    """exp(evidence), to sum 1. Some of it may be -inf, not all."""
    weights = np.exp(evidence - evidence.max())
    return weights / weights.sum()


def trained_temperature(config: Any) -> float:
    """The temperature that a model's embeddings were trained with, as its configuration says.

    Raises CheckpointError when that is no positive number.
    """
    return as_temperature(getattr(config, TEMPERATURE_KEY, DEFAULT_TEMPERATURE), "config.json")


def as_temperature(value: Any, file: str) -> float:
    """What `file` says, as a number. Raises CheckpointError when it is no positive one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise CheckpointError(
            f"{file}: {TEMPERATURE_KEY} is {value!r}; use the positive number that the embeddings "
            f"were trained with, or take it out (then it is {DEFAULT_TEMPERATURE})"
        )
    return number
