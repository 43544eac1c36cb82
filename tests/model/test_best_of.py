"""`best_of`: the answer that fits the image best, by embedding and judgement."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cafe.errors import DataError
from cafe.model import best_of
from cafe.model.best_of import candidates, posterior_of
from cafe.model.rerank import DEFAULT_TEMPERATURE
from cafe.model.rows.inputs import as_messages
from cafe.model.vlm import CAFe
from helpers.images import noise

ASKED: list[Any] = [
    {"text": "What is it?", "image": noise(1)},
    {"text": "Which?", "image": [noise(2), noise(3)]},
    [
        {"role": "user", "content": [{"type": "image", "image": noise(4)}, "What?"]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Where?"},
    ],
]
SHOWN: list[Any] = [noise(1), {"image": [noise(2), noise(3)]}, noise(4)]


@pytest.fixture(scope="module")
def model(babbling_model: CAFe) -> CAFe:
    return babbling_model


def ranked(model: CAFe, samples: int, seed: int = 0, **sampling: Any) -> Any:
    torch.manual_seed(seed)
    return candidates(model, as_messages(ASKED), samples, 6, 4, sampling)


def written(model: CAFe, asked: Any, shown: Any, text: str) -> float:
    """log P of an answer by the plain processor and model, in a pass of its own."""
    conversation = as_messages([asked])[0]
    prompt = model.collator.render.prompt(conversation).text
    images = shown["image"] if isinstance(shown, dict) else [shown]

    def tokens(written: str) -> Any:
        return model.processor(images=[images], text=[written], return_tensors="pt")

    whole = tokens(prompt + text + "<|im_end|>")
    begin = tokens(prompt)["input_ids"].shape[1]
    with torch.inference_mode():
        log_p = model.model(**whole).logits[0].log_softmax(-1)
    answer = whole["input_ids"][0, begin:]
    return float(log_p[begin - 1 : -1].gather(1, answer[:, None]).sum())


def test_candidates_are_ranked_by_what_three_witnesses_say(model: CAFe):
    found = ranked(model, 4, temperature=3.0)
    assert len(found) == len(ASKED)
    images = model.encode(SHOWN)
    for own, asked, shown, image in zip(found, ASKED, SHOWN, images, strict=True):
        texts = [c.text for c in own]
        assert 3 <= len(set(texts)) == len(texts) <= 5, "distinct: the greedy and four samples"
        cosines = model.encode(texts) @ image
        assert np.abs(cosines - [c.similarity for c in own]).max() <= 1e-5
        said = [c for c in own if c.text]  # an empty answer comes last, however probable
        assert (np.diff([c.posterior for c in said]) <= 0).all()
        log_p = np.array([written(model, asked, shown, c.text) for c in said])
        np.testing.assert_allclose([c.log_p for c in said], log_p, rtol=1e-5, atol=1e-4)
        near = cosines[: len(said)] / DEFAULT_TEMPERATURE
        if not isinstance(shown, dict):  # of several images nothing is asked
            near = (near + logit(model.score(shown, [c.text for c in said]))) / 2
        total = log_p + near / 2
        weights = np.exp(total - total.max())
        want = weights / weights.sum()
        np.testing.assert_allclose([c.posterior for c in said], want, rtol=1e-3, atol=1e-9)
    greedy = model.generate(ASKED, max_new_tokens=6)
    assert all(g in [c.text for c in own] for g, own in zip(greedy, found, strict=True))


def logit(probability: np.ndarray) -> np.ndarray:
    return np.log(probability) - np.log1p(-probability)


def test_a_choice_that_a_person_can_check():
    """8 times the fourth root of 1 x 16, 2 times that of 64 x 4, and silence: 16, 8, 0."""
    log_p = np.array([np.log(8), np.log(2), -np.inf])
    evidence, odds = np.log([1.0, 64.0, 1e9]), np.array([np.log(16), np.log(4), np.nan])
    assert posterior_of(log_p, evidence, odds).tolist() == pytest.approx([16 / 24, 8 / 24, 0])
    nothing_asked = posterior_of(log_p, evidence, np.full(3, np.nan))
    assert nothing_asked.tolist() == pytest.approx([8 / 24, 16 / 24, 0])
    assert posterior_of(log_p[2:], evidence[2:], odds[2:]).tolist() == [1]


@pytest.mark.parametrize("witness", ["log_odds", "log_likelihood"])
def test_each_witness_can_overrule_the_others(
    model: CAFe, monkeypatch: pytest.MonkeyPatch, witness: str
):
    before = [own[0].text for own in ranked(model, 4, temperature=3.0)]

    def against(_: CAFe, asked: list[Any], batch_size: int) -> torch.Tensor:
        """A sure "no" to the answers that won, and to nothing else."""
        said = [question[-1].text for question in asked]
        won = [any(w in (text, f'"{text}"') or f'"{w}"' in text for w in before) for text in said]
        return -999.0 * torch.tensor(won)

    monkeypatch.setattr(best_of.judging, witness, against)
    now = [own[0].text for own in ranked(model, 4, temperature=3.0)]
    overruled = [a != b for a, b in zip(now, before, strict=True)]
    assert overruled == [True, witness == "log_likelihood", True], "of two images none is asked"


def test_samples_are_drawn_at_a_moderate_temperature_unless_one_is_given(
    model: CAFe, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[Any] = []

    def answers(_: Any, conversations: Any, *rest: Any) -> list[str]:
        drawn.append(rest[-1])
        return ["a"] * len(conversations)

    monkeypatch.setattr(best_of.inference, "generate", answers)
    ranked(model, 2)
    ranked(model, 2, temperature=1.5)
    monkeypatch.setattr(model.model.generation_config, "temperature", 0.01)  # as Qwen2-VL's file
    ranked(model, 2)
    sampled = [{"temperature": t, "num_beams": 1, "do_sample": True} for t in (0.6, 1.5, 0.6)]
    assert drawn == [{}, sampled[0], {}, sampled[1], {}, sampled[2]]


def test_generate_gives_the_first_candidate(model: CAFe):
    want = [own[0].text for own in ranked(model, 3, temperature=3.0)]
    torch.manual_seed(0)
    settings: Any = {"best_of": 3, "max_new_tokens": 6, "batch_size": 4, "temperature": 3.0}
    assert model.generate(ASKED, **settings) == want
    torch.manual_seed(0)
    one = model.generate(ASKED[0], **settings)
    assert isinstance(one, str)


def test_samples_alike_leave_the_greedy_answer_alone(model: CAFe):
    found = ranked(model, 3, top_k=1)
    greedy = model.generate(ASKED, max_new_tokens=6)
    assert [[c.text for c in own] for own in found] == [[g] for g in greedy]


def test_an_empty_answer_is_taken_only_when_there_is_no_other(
    model: CAFe, monkeypatch: pytest.MonkeyPatch
):
    def answers(_: Any, conversations: Any, *rest: Any) -> list[str]:
        sampled = rest[-1]
        return ["no"] * len(conversations) if sampled else [""] * len(conversations)

    monkeypatch.setattr(best_of.inference, "generate", answers)
    assert [c.text for c in ranked(model, 2)[0]] == ["no", ""]


def test_what_cannot_be_chosen_is_told(model: CAFe):
    with pytest.raises(DataError, match="input 1: best_of compares answers with an image"):
        model.generate([ASKED[0], "hi"], best_of=2)
    with pytest.raises(ValueError, match="best_of=0: sample at least one"):
        model.generate(ASKED[0], best_of=0)
    with pytest.raises(ValueError, match="leave do_sample out"):
        model.generate(ASKED[0], best_of=2, do_sample=False)
    with pytest.raises(ValueError, match="leave do_sample out, or temperature=0"):
        model.generate(ASKED[0], best_of=2, temperature=0)
    with pytest.raises(ValueError, match="one conversation at a time, without best_of"):
        model.generate(ASKED[0], best_of=2, stream=True)


def test_a_temperature_is_enough_to_sample(model: CAFe):
    torch.manual_seed(0)
    answers = {str(model.generate("hi", max_new_tokens=6, temperature=3.0)) for _ in range(5)}
    assert len(answers) > 1
    assert model.generate("hi", max_new_tokens=6, top_k=1) == model.generate("hi", max_new_tokens=6)
