"""`best_of`: the answer that fits the picture best, by embedding and judgement."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from cafe.errors import DataError
from cafe.model import best_of
from cafe.model.best_of import candidates
from cafe.model.inputs import as_messages
from cafe.model.rerank import DEFAULT_TEMPERATURE
from cafe.model.vlm import CAFe


def noise(seed: int) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


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


def test_candidates_are_ranked_by_what_reranking_says_of_them(model: CAFe):
    found = ranked(model, 4, temperature=3.0)
    assert len(found) == len(ASKED)
    pictures = model.encode(SHOWN)
    for own, shown, picture in zip(found, SHOWN, pictures, strict=True):
        texts = [c.text for c in own]
        assert 3 <= len(set(texts)) == len(texts) <= 5, "distinct: the greedy and four samples"
        cosines = model.encode(texts) @ picture
        assert np.abs(cosines - [c.similarity for c in own]).max() <= 1e-5
        if isinstance(shown, dict):  # several pictures: there is no question, so the cosine decides
            weights = np.exp(cosines / DEFAULT_TEMPERATURE)
            want = weights / weights.sum()
        else:
            want = model.rerank(shown, [t or "-" for t in texts], cosines).posterior
        said = [c for c in own if c.text]  # an empty answer comes last, however probable
        assert (np.diff([c.posterior for c in said]) <= 0).all()
        if len(said) == len(own):
            np.testing.assert_allclose([c.posterior for c in own], want, rtol=1e-3)
    assert sum(all(c.text for c in own) for own in found) >= 2, "compared above"
    greedy = model.generate(ASKED, max_new_tokens=6)
    assert all(g in [c.text for c in own] for g, own in zip(greedy, found, strict=True))
    assert any(g != own[0].text for g, own in zip(greedy, found, strict=True)), "it matters"


def test_the_judgement_can_overrule_the_embedding(model: CAFe, monkeypatch: pytest.MonkeyPatch):
    before = [own[0].text for own in ranked(model, 4, temperature=3.0)]

    def against(_: CAFe, questions: list[Any], batch_size: int) -> torch.Tensor:
        """A sure "no" to the answers that won, and to nothing else."""
        won = [any(f'"{text}"' in question[0].text for text in before) for question in questions]
        return -99.0 * torch.tensor(won)

    monkeypatch.setattr(best_of.inference, "log_odds", against)
    now = [own[0].text for own in ranked(model, 4, temperature=3.0)]
    assert [a != b for a, b in zip(now, before, strict=True)] == [True, False, True]


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
    monkeypatch.setattr(model.model.generation_config, "temperature", 0.2)
    ranked(model, 2)
    sampled = [{"temperature": t, "do_sample": True} for t in (0.6, 1.5, 0.2)]
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
    with pytest.raises(DataError, match="input 1: best_of compares answers with a picture"):
        model.generate([ASKED[0], "hi"], best_of=2)
    with pytest.raises(ValueError, match="best_of=0: sample at least one"):
        model.generate(ASKED[0], best_of=0)
    with pytest.raises(ValueError, match="leave do_sample out"):
        model.generate(ASKED[0], best_of=2, do_sample=False)
    with pytest.raises(ValueError, match="one conversation at a time, without best_of"):
        model.generate(ASKED[0], best_of=2, stream=True)


def test_a_temperature_is_enough_to_sample(model: CAFe):
    torch.manual_seed(0)
    answers = {str(model.generate("hi", max_new_tokens=6, temperature=3.0)) for _ in range(5)}
    assert len(answers) > 1
    assert model.generate("hi", max_new_tokens=6, top_k=1) == model.generate("hi", max_new_tokens=6)
