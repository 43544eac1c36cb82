"""Reranking: the evidence of the embedding, and of what the model says of each pair, added.

Contrastive training makes cosine / temperature the log-ratio of a candidate's probability given
this query to its probability without one, up to a constant (van den Oord et al., arXiv 1807.03748,
§2.3). The log-odds of "yes" to the match question are a second score. Taken as conditionally
independent (naive Bayes), with a uniform prior over the candidates, they give

    P(candidate i is the one meant) = softmax_i( cosine_i / temperature + log P(yes) / P(no) )

Ordering by P(yes) alone would discard the first score, and the match question was trained on one
image at a time: nothing made its answers comparable between images.

In place of the question's log-odds, the likelihood of the text as the image's caption may be the
second score, log P(text | image) in nats (VisualGPTScore, arXiv 2306.01879). It reads a text word
by word, each with another look at the image, so it knows which object is where and which single
word is wrong. It is comparable between images of one text; between texts, a short or common one
scores higher, so it orders texts of one kind, such as captions, and not a word against a page.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from cafe.errors import CheckpointError

if TYPE_CHECKING:
    from jaxtyping import Float

RerankBy = Literal["question", "likelihood"]
"""The second score: the odds of "yes" to the match question, or log P(text | image)."""

DEFAULT_TEMPERATURE = 0.05
"""For a model whose configuration names none: the published logit scale of 20."""

TEMPERATURE_KEY = "contrastive_temperature"
"""In config.json. (transformers takes "temperature" for a generation setting.)"""

ANSWER_TOKENS_KEY = "classifier_from_token"
"""In config.json, vLLM's name: the two tokens, for no and for yes, that a score is read from.
Without it every spelling counts (`cafe.model.judging.yes_no_tokens`)."""


class Reranked(NamedTuple):
    """Scores of each candidate, in the candidates' order.

    posterior       float64 [n], sum 1: the probability that this candidate is the one meant, if
                    one is
    match           float32 [n]: the probability of "yes" to each candidate's match question; None
                    by likelihood
    log_likelihood  float32 [n]: log P(text | image), in nats; None by question
    """

    posterior: Float[np.ndarray, " n"]
    match: Float[np.ndarray, " n"] | None = None
    log_likelihood: Float[np.ndarray, " n"] | None = None


def reranked(
    cosines: Float[np.ndarray, " n"],
    judged: Float[np.ndarray, " n"],
    temperature: float,
    by: RerankBy = "question",
) -> Reranked:
    """Combine both scores.

    Args:
        cosines: of the query's embedding with each candidate's.
        judged: log P(yes) / P(no) of each match question; or log P(text | image).
        temperature: of the contrastive training (`trained_temperature`).
        by: which of these `judged` is.

    Raises:
        ValueError: different lengths.
    """
    if cosines.shape != judged.shape or cosines.ndim != 1:
        raise ValueError(f"cosines {cosines.shape} and judged {judged.shape}: use [n] and [n]")
    second = judged.astype(np.float64)
    evidence = cosines.astype(np.float64) / temperature + second
    posterior = softmax(evidence) if len(evidence) else evidence
    if by == "likelihood":
        return Reranked(posterior, log_likelihood=judged.astype(np.float32))
    return Reranked(posterior, probability_of_yes(second).astype(np.float32))


def probability_of_yes(log_odds: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """P(yes) from log P(yes) / P(no): the sigmoid, without overflow."""
    return 0.5 * (1 + np.tanh(log_odds / 2))


def softmax(evidence: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """exp(evidence), normalised to sum 1. Some values may be -inf, but not all."""
    weights = np.exp(evidence - evidence.max())
    return weights / weights.sum()


def trained_temperature(config: Any) -> float:
    """The temperature that a model's embeddings were trained with, from its configuration.

    Raises:
        CheckpointError: it is not a positive number.
    """
    return as_temperature(getattr(config, TEMPERATURE_KEY, DEFAULT_TEMPERATURE), "config.json")


def as_temperature(value: Any, file: str) -> float:
    """`value`, read from `file`, as a number.

    Raises:
        CheckpointError: it is not a positive number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise CheckpointError(
            f"{file}: {TEMPERATURE_KEY} is {value!r}; use the positive number that the embeddings "
            f"were trained with, or remove the key (then it is {DEFAULT_TEMPERATURE})"
        )
    return number


def named_answer_tokens(config: Any, tokenizer: Any) -> tuple[int, int] | None:
    """The ids of the tokens for no and for yes that the configuration names; None: it names none.

    Raises:
        CheckpointError: they are not two different tokens of the vocabulary.
    """
    names = getattr(config, ANSWER_TOKENS_KEY, None)
    if names is None:
        return None
    vocabulary = tokenizer.get_vocab()
    two = isinstance(names, list) and len(names) == 2 and names[0] != names[1]
    if not two or any(not isinstance(name, str) or name not in vocabulary for name in names):
        raise CheckpointError(
            f"config.json: {ANSWER_TOKENS_KEY} is {names!r}; use two tokens of the vocabulary, for "
            'no and for yes (["no", "yes"]), or remove the key'
        )
    return vocabulary[names[0]], vocabulary[names[1]]
