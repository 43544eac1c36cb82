"""Reranking: the embedding and the match question, added by Bayes' rule."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cafe.errors import CheckpointError, DataError
from cafe.model.rerank import DEFAULT_TEMPERATURE, reranked, trained_temperature
from cafe.model.teacher_forced import score_examples
from cafe.model.vlm import CAFe
from cafe.types import CAPTION_REQUEST, Example, Image, Message, user
from helpers.images import noise

IMAGES = [noise(seed) for seed in range(4)]


def twin(cosines: list[float], matches: list[float], temperature: float) -> list[float]:
    """Bayes' rule, a product at a time."""
    products = [
        math.exp(cosine / temperature) * match / (1 - match)
        for cosine, match in zip(cosines, matches, strict=True)
    ]
    return [product / sum(products) for product in products]


def test_the_posterior_is_bayes_rule_on_two_witnesses():
    cosines, matches = [0.8, 0.7, -0.2, 0.75], [0.4, 0.9, 0.99, 0.01]
    odds = np.log(np.array(matches) / (1 - np.array(matches)))
    for temperature in (0.02, 0.05, 1.0):
        found = reranked(np.array(cosines), odds, temperature)
        np.testing.assert_allclose(found.posterior, twin(cosines, matches, temperature), rtol=1e-9)
        np.testing.assert_allclose(found.match, matches, rtol=1e-6)
    # Neither witness alone has this order: 0 3 1 2 by the cosine, 2 1 0 3 by the answer.
    order = np.argsort(-reranked(np.array(cosines), odds, 0.05).posterior)
    assert order.tolist() == [1, 0, 3, 2]


def test_the_surest_answers_keep_their_order():
    """P(yes) of both rounds to 1, and is the same number; the posterior still tells them apart."""
    found = reranked(np.array([0.5, 0.6, -1.0]), np.array([90.0, 90.0, -900.0]), 0.01)
    assert found.match.tolist() == [1.0, 1.0, 0.0]
    assert found.posterior[1] > found.posterior[0] > found.posterior[2] == 0
    assert found.posterior.sum() == pytest.approx(1)


def test_cosines_and_candidates_must_be_as_many():
    with pytest.raises(ValueError, match=r"cosines \(2,\) and judged \(3,\)"):
        reranked(np.zeros(2), np.zeros(3), 0.05)


def test_rerank_weighs_the_models_own_embeddings_and_answers(small_model: CAFe):
    text = "a red cat"
    match = small_model.score(text, IMAGES)
    cosines = small_model.encode(IMAGES) @ small_model.encode(text)
    expected = twin(cosines.tolist(), match.tolist(), DEFAULT_TEMPERATURE)
    for given in (None, cosines):
        found = small_model.rerank(text, IMAGES, given, batch_size=3)
        np.testing.assert_allclose(found.match, match, atol=1e-6)
        np.testing.assert_allclose(found.posterior, expected, rtol=1e-3)
    far = np.array([-1.0, -1.0, 1.0, -1.0])
    assert small_model.rerank(text, IMAGES, far).posterior.argmax() == 2
    # The other way: texts about one image.
    texts = ["a red cat", "a small bus at the top left"]
    by_image = small_model.rerank(IMAGES[0], texts)
    assert by_image.match is not None
    assert by_image.match[0] == pytest.approx(match[0], abs=1e-6)
    assert small_model.rerank(text, []).posterior.shape == (0,)


def test_by_likelihood_the_second_witness_is_the_caption(small_model: CAFe):
    """Both directions, against teacher forcing one pair at a time."""

    def log_p(image: Any, text: str) -> float:
        dialogue = (*user(Image(image), CAPTION_REQUEST), Message("assistant", (text,)))
        (scored,) = score_examples(small_model, [Example("one", dialogues=(dialogue,))])
        return -scored.answers[0].nll_nats

    texts = ["a red cat", "a small bus at the top left", "a cat red"]
    for query, candidates, pairs in (
        (texts[0], IMAGES, [(image, texts[0]) for image in IMAGES]),
        (IMAGES[1], texts, [(IMAGES[1], text) for text in texts]),
    ):
        cosines = small_model.encode(candidates) @ small_model.encode(query)
        found = small_model.rerank(query, candidates, by="likelihood", batch_size=2)
        expected = [log_p(*pair) for pair in pairs]
        assert found.match is None
        assert found.log_likelihood is not None
        np.testing.assert_allclose(found.log_likelihood, expected, rtol=1e-4)
        products = np.exp(cosines / DEFAULT_TEMPERATURE + np.array(expected) - np.max(expected))
        np.testing.assert_allclose(found.posterior, products / products.sum(), rtol=1e-2)
    assert len({round(value, 3) for value in expected}) == 3, "the order of words counts"
    with pytest.raises(ValueError, match="by='guess': rerank by question or by likelihood"):
        small_model.rerank("a cat", IMAGES, by="guess")  # pyright: ignore[reportArgumentType]


def test_what_cannot_be_compared_is_told(small_model: CAFe):
    with pytest.raises(DataError, match="by likelihood compares one image with a text"):
        small_model.rerank("a cat", ["a dog"], by="likelihood")
    with pytest.raises(DataError, match="by likelihood compares one image with a text"):
        small_model.rerank(IMAGES[0], IMAGES[1:], by="likelihood")
    with pytest.raises(DataError, match="the candidate is empty"):
        small_model.rerank("a cat", [""])
    with pytest.raises(DataError, match="the query is empty"):
        small_model.rerank("", ["a cat"])


def test_anything_is_reranked_against_anything(small_model: CAFe):
    """Each pair by itself, and all together with the cosines, as for an image and a text."""
    page = {"image": IMAGES[0], "text": "a page"}
    candidates: list[Any] = ["a dog", "a red cat", IMAGES[1], page]
    for query in ("a cat", IMAGES[0], page):
        found = small_model.rerank(query, candidates, batch_size=3)
        alone = [float(small_model.score(query, [one])[0]) for one in candidates]
        assert found.match is not None
        np.testing.assert_allclose(found.match, alone, atol=1e-6)
        assert len({round(value, 4) for value in alone}) > 2, "all alike shows nothing"
        vectors = small_model.encode([query, *candidates])
        evidence = vectors[1:] @ vectors[0] / DEFAULT_TEMPERATURE + np.log(
            alone / (1 - np.array(alone))
        )
        want = np.exp(evidence - evidence.max())
        np.testing.assert_allclose(found.posterior, want / want.sum(), rtol=1e-3)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "warm", None, [0.05]])
def test_a_temperature_that_is_none_is_told(value: Any):
    with pytest.raises(CheckpointError, match=r"config\.json: contrastive_temperature is .*; use"):
        trained_temperature(SimpleNamespace(contrastive_temperature=value))


def test_the_temperature_is_saved_with_the_model(small_model: CAFe, tmp_path: Path):
    config: Any = small_model.model.config
    assert trained_temperature(config) == DEFAULT_TEMPERATURE
    cosines = np.array([0.1, 0.2, 0.3, 0.4])
    try:
        config.contrastive_temperature = 0.01
        small_model.save_pretrained(tmp_path)
        sharp = small_model.rerank("a cat", IMAGES, cosines)
    finally:
        del config.contrastive_temperature
    loaded = CAFe.from_pretrained(tmp_path)
    assert trained_temperature(loaded.model.config) == 0.01
    again = loaded.rerank("a cat", IMAGES, cosines)
    np.testing.assert_allclose(again.posterior, sharp.posterior, rtol=1e-3)
    assert again.posterior[3] > small_model.rerank("a cat", IMAGES, cosines).posterior[3]
