"""Several answers, of which the model itself chooses the most faithful.

One set of weights writes, embeds and judges, so an answer has three witnesses: the probability with
which the model writes it, how near it lies to the picture as an embedding, and the model's "yes" to
the question whether the picture shows it. By Bayes' rule, with what was written as the prior,

    P(answer i is right) = softmax_i( log p_i + mean(cosine_i / temperature, log-odds_i) / 2 )

The two that look at picture and text see much the same, so their mean stands for both; and the
prior has seen the picture too, so it counts half. (Measured at four sampling temperatures on 600
scenes: half is better than nothing and than all of it. Without the prior an unlikely sample wins
by their noise, and greedy is better: docs/benchmarks.md.)

The question is about one picture: beside several, or a video, the embedding is the only one that
looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.nn import functional

from cafe.errors import DataError
from cafe.model import inference
from cafe.model.inference import match_question
from cafe.model.prompts import DEFAULT_PROMPT
from cafe.model.rerank import softmax, trained_temperature
from cafe.types import Conversation, Image, Message, Video, user

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from cafe.model.vlm import CAFe


SAMPLING_TEMPERATURE = 0.6
"""Where neither the caller nor the model's generation settings say one. CHAIR-i of the chosen
descriptions of 600 scenes, minus that of greedy ones: -0.020 at 0.4 and at 0.6, -0.022 at 0.8,
-0.009 at 1.
"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer.

    log_p       of all its tokens, as the model writes them without sampling settings, in nats
    similarity  cosine of its embedding to that of the conversation's pictures
    posterior   the probability that it is the right one, if one of the answers is
    """

    text: str
    log_p: float
    similarity: float
    posterior: float


def candidates(
    model: CAFe,
    conversations: Sequence[Conversation],
    samples: int,
    max_new_tokens: int,
    batch_size: int,
    sampling: dict[str, Any],
) -> list[list[Candidate]]:
    """For each conversation its distinct answers, the most probable first.

    They are the greedy answer and `samples` sampled ones; of equally probable ones the greedy is
    the first, then the first sampled. An empty answer comes last.

    sampling   as for `CAFe.generate`
    Raises DataError for a conversation without a picture; ValueError for samples < 1, and for
    settings that do not sample.
    """
    if samples < 1:
        raise ValueError(f"best_of={samples}: sample at least one answer")
    if sampling.get("do_sample", True) is False:
        raise ValueError("best_of samples its answers: leave do_sample out")
    shown = [_shown(c, n) for n, c in enumerate(conversations)]
    greedy = inference.generate(model, conversations, max_new_tokens, batch_size, {})
    # Copies of a conversation stand side by side, so its picture is seen once in a batch.
    copies = [c for c in conversations for _ in range(samples)]
    own_temperature = model.model.generation_config.temperature
    settings = {"temperature": own_temperature or SAMPLING_TEMPERATURE, **sampling}
    sampled = inference.generate(
        model, copies, max_new_tokens, batch_size, {**settings, "do_sample": True}
    )
    texts = [
        list(dict.fromkeys([greedy[i], *sampled[i * samples : (i + 1) * samples]]))
        for i in range(len(conversations))
    ]
    embeddings = functional.normalize(
        inference.encode(
            model,
            [*shown, *(user(text) for own in texts for text in own)],
            batch_size,
            DEFAULT_PROMPT,
        ),
        dim=1,
    )
    pictures, answers = embeddings[: len(shown)], embeddings[len(shown) :]
    log_p = _log_p(model, conversations, texts, batch_size)
    odds = _log_odds(model, shown, texts, batch_size)
    temperature = trained_temperature(model.model.config)
    ranked, begin = [], 0
    for picture, own in zip(pictures, texts, strict=True):
        part = slice(begin, begin + len(own))
        begin += len(own)
        cosines = (answers[part] @ picture).numpy()
        posterior = posterior_of(log_p[part], cosines / temperature, odds[part])
        found = map(Candidate, own, log_p[part].tolist(), cosines.tolist(), posterior.tolist())
        ranked.append(sorted(found, key=lambda c: (c.text == "", -c.posterior)))
    return ranked


def posterior_of(
    log_p: Float[np.ndarray, " n"], evidence: Float[np.ndarray, " n"], odds: Float[np.ndarray, " n"]
) -> np.ndarray:
    """How probable each of n answers is, float64 [n] with sum 1.

    log_p      of each as it is written; -inf for an empty answer, which is never right
    evidence   its cosine over the temperature
    odds       log-odds that the picture shows it; NaN where nothing was asked
    """
    witnesses = np.stack([evidence, odds]).astype(np.float64)
    if np.isneginf(log_p).all():
        return np.full(len(log_p), 1 / len(log_p))
    return softmax(log_p + np.nanmean(witnesses, axis=0) / 2)


def _log_p(
    model: CAFe,
    conversations: Sequence[Conversation],
    texts: Sequence[Sequence[str]],
    batch_size: int,
) -> np.ndarray:
    """Log P of every answer, float32, answer by answer; -inf for an empty one."""
    answered = [
        (*conversation, Message("assistant", (text,))) if text else None
        for conversation, own in zip(conversations, texts, strict=True)
        for text in own
    ]
    return _filled(answered, -np.inf, lambda c: inference.log_likelihood(model, c, batch_size))


def _log_odds(
    model: CAFe, shown: Sequence[Conversation], texts: Sequence[Sequence[str]], batch_size: int
) -> np.ndarray:
    """That its picture shows what an answer says, float32, answer by answer.

    NaN where there is nothing to ask: several pictures, a video, an empty answer.
    """
    questions = [
        match_question(pictures, user(text)) if text and _one_picture(pictures) else None
        for pictures, own in zip(shown, texts, strict=True)
        for text in own
    ]
    return _filled(questions, np.nan, lambda q: inference.log_odds(model, q, batch_size))


def _filled(
    asked: Sequence[Conversation | None],
    nothing: float,
    function: Callable[[list[Conversation]], Tensor],
) -> np.ndarray:
    """The function's float32 for each conversation, and `nothing` where there is none."""
    found = np.full(len(asked), nothing, dtype=np.float32)
    there = [i for i, conversation in enumerate(asked) if conversation is not None]
    found[there] = function([c for c in asked if c is not None]).numpy()
    return found


def _one_picture(shown: Conversation) -> bool:
    parts = shown[0].content
    return len(parts) == 1 and isinstance(parts[0], Image)


def _shown(conversation: Conversation, number: int) -> Conversation:
    """The pictures and videos of a conversation, alone."""
    parts = [
        part
        for message in conversation
        for part in message.content
        if isinstance(part, Image | Video)
    ]
    if not parts:
        raise DataError(
            f"input {number}: best_of compares answers with a picture, and there is none"
        )
    return (Message("user", tuple(parts)),)
