"""Several answers, of which the model itself chooses the most faithful.

One set of weights writes, embeds and judges, so there are three pieces of evidence for an answer:
the probability with which the model writes it, the cosine of its embedding to the image's, and the
model's "yes" to the question whether the image shows it. By Bayes' rule, with the probability of
the text as the prior,

    P(answer i is right) = softmax_i( log p_i + mean(cosine_i / temperature, log-odds_i) / 2 )

The two scores that compare image and text are strongly correlated, so their mean stands for both;
and the prior has seen the image too, so that mean counts half. (Measured at four sampling
temperatures on 600 scenes: half is better than none of it and than all of it. Without the prior an
unlikely sample wins through the scores' noise, and greedy decoding is better:
docs/benchmarks.md.)

The question is about one image: for several images, or a video, only the embedding is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.nn import functional

from cafe.errors import DataError
from cafe.model import inference, judging
from cafe.model.inference import InferenceModel
from cafe.model.rerank import softmax, trained_temperature
from cafe.model.rows.matching import match_question
from cafe.model.rows.prompts import DEFAULT_PROMPT
from cafe.types import Conversation, Image, Message, user

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


SAMPLING_TEMPERATURE = 0.6
"""Used if the caller sets none; that of generation_config.json may be greedy decoding in disguise
(Qwen2-VL's is 0.01). CHAIR-i of the chosen
descriptions of 600 scenes, minus that of greedy ones: -0.020 at 0.4 and at 0.6, -0.022 at 0.8,
-0.009 at 1.
"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer.

    text        without white space at its ends
    log_p       log-probability of all its tokens at temperature 1, in nats
    similarity  cosine of its embedding to that of the conversation's images
    posterior   the probability that it is the right one, if one of the answers is
    """

    text: str
    log_p: float
    similarity: float
    posterior: float


def best(
    model: InferenceModel,
    conversations: Sequence[Conversation],
    samples: int,
    max_new_tokens: int,
    batch_size: int,
    sampling: dict[str, Any],
) -> list[str]:
    """The most probable of the `candidates` for each conversation."""
    ranked = candidates(model, conversations, samples, max_new_tokens, batch_size, sampling)
    return [first.text for first, *_ in ranked]


def candidates(
    model: InferenceModel,
    conversations: Sequence[Conversation],
    samples: int,
    max_new_tokens: int,
    batch_size: int,
    sampling: dict[str, Any],
) -> list[list[Candidate]]:
    """For each conversation its distinct answers, the most probable first.

    These are the greedy answer and `samples` sampled ones. Ties are broken in favour of the greedy
    answer, then of the one sampled first. An empty answer comes last.

    Args:
        model: writes, embeds and judges the answers.
        conversations: each with at least one image or video.
        samples: answers to sample for each conversation.
        max_new_tokens: of an answer.
        batch_size: inputs per forward.
        sampling: as for `CAFe.generate`.

    Raises:
        DataError: a conversation without an image.
        ValueError: samples < 1, or settings that do not sample.
    """
    if samples < 1:
        raise ValueError(f"best_of={samples}: sample at least one answer")
    if inference.is_greedy(sampling):
        raise ValueError("best_of samples its answers: leave do_sample out, or temperature=0")
    visual = [_images_only(c, n) for n, c in enumerate(conversations)]
    greedy = inference.generate(model, conversations, max_new_tokens, batch_size, {})
    # Copies of a conversation are adjacent, so a batch computes its image once.
    copies = [c for c in conversations for _ in range(samples)]
    settings = {"temperature": SAMPLING_TEMPERATURE, "num_beams": 1, **sampling, "do_sample": True}
    sampled = inference.generate(model, copies, max_new_tokens, batch_size, settings)
    texts = [
        list(dict.fromkeys([greedy[i], *sampled[i * samples : (i + 1) * samples]]))
        for i in range(len(conversations))
    ]
    embeddings = functional.normalize(
        inference.encode(
            model,
            [*visual, *(user(text) for own in texts for text in own)],
            batch_size,
            DEFAULT_PROMPT,
        ),
        dim=1,
    )
    images, answers = embeddings[: len(visual)], embeddings[len(visual) :]
    log_p = _log_p(model, conversations, texts, batch_size)
    odds = _log_odds(model, visual, texts, batch_size)
    temperature = trained_temperature(model.model.config)
    ranked, begin = [], 0
    for image, own in zip(images, texts, strict=True):
        part = slice(begin, begin + len(own))
        begin += len(own)
        cosines = (answers[part] @ image).numpy()
        posterior = posterior_of(log_p[part], cosines / temperature, odds[part])
        answered = map(Candidate, own, log_p[part].tolist(), cosines.tolist(), posterior.tolist())
        ranked.append(sorted(answered, key=lambda c: (c.text == "", -c.posterior)))
    return ranked


def posterior_of(
    log_p: Float[np.ndarray, " n"], evidence: Float[np.ndarray, " n"], odds: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """The probability that each of n answers is the right one, float64 with sum 1.

    Args:
        log_p: log-probability of each text; -inf for an empty answer, which is never right.
        evidence: cosine of answer and image, divided by the temperature.
        odds: log-odds that the image shows what the answer says; NaN where this was not asked.
    """
    scores = np.stack([evidence, odds]).astype(np.float64)
    if np.isneginf(log_p).all():
        return np.full(len(log_p), 1 / len(log_p))
    return softmax(log_p + np.nanmean(scores, axis=0) / 2)


def _log_p(
    model: InferenceModel,
    conversations: Sequence[Conversation],
    texts: Sequence[Sequence[str]],
    batch_size: int,
) -> np.ndarray:
    """Log-probability of every answer, float32 [answers]; -inf for an empty one."""
    answered = [
        (*conversation, Message("assistant", (text,))) if text else None
        for conversation, own in zip(conversations, texts, strict=True)
        for text in own
    ]
    return _filled(answered, -np.inf, lambda c: judging.log_likelihood(model, c, batch_size))


def _log_odds(
    model: InferenceModel,
    visual: Sequence[Conversation],
    texts: Sequence[Sequence[str]],
    batch_size: int,
) -> np.ndarray:
    """Log-odds that the image shows what each answer says, float32 [answers].

    NaN where the question does not apply: several images, a video, an empty answer.
    """
    questions = [
        match_question(images, user(text)) if text and _one_image(images) else None
        for images, own in zip(visual, texts, strict=True)
        for text in own
    ]
    return _filled(questions, np.nan, lambda q: judging.log_odds(model, q, batch_size))


def _filled(
    conversations: Sequence[Conversation | None],
    missing: float,
    function: Callable[[list[Conversation]], Tensor],
) -> np.ndarray:
    """The function's value for each conversation, float32, and `missing` in place of None."""
    values = np.full(len(conversations), missing, dtype=np.float32)
    present = [i for i, conversation in enumerate(conversations) if conversation is not None]
    values[present] = function([c for c in conversations if c is not None]).numpy()
    return values


def _one_image(visual: Conversation) -> bool:
    parts = visual[0].content
    return len(parts) == 1 and isinstance(parts[0], Image)


def _images_only(conversation: Conversation, number: int) -> Conversation:
    """The images and videos of a conversation, without its text."""
    parts = [
        part for message in conversation for part in message.content if not isinstance(part, str)
    ]
    if not parts:
        raise DataError(
            f"input {number}: best_of compares answers with an image, but there is none"
        )
    return (Message("user", tuple(parts)),)
