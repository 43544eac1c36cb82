"""Generation in steps: the same tokens as in one go, whatever is computed between two steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cafe.errors import DataError
from cafe.model.rows.matching import match_question
from cafe.model.vlm import CAFe
from cafe.serving.decoding import ChatDecoding
from cafe.serving.messages import Completion, Prompt, WorkItem
from cafe.serving.model_calls import CafeCalls
from cafe.serving.sampling import RowSampler, probabilities
from cafe.types import Image, user
from helpers.images import sample_image


def prompts() -> list[Prompt]:
    describe, ask = "Describe this image.", "How many objects are there?"
    return [
        Prompt(user(Image(sample_image(1)), describe), 24),
        Prompt(user("Write two sentences about a cat."), 9),
        Prompt(user(Image(sample_image(2)), ask), 24),
    ]


def finished(
    decoding: ChatDecoding, asked: Sequence[WorkItem], between: Any = lambda: None
) -> dict[int, Completion]:
    """The answers of prompts that are admitted together."""
    answers: dict[int, Completion] = {}
    events = decoding.admit(dict(enumerate(asked)))
    while True:
        answers |= {e.row: e.answer for e in events if e.answer is not None}
        if not (events := decoding.step()):
            return answers
        between()


def items() -> list[WorkItem]:
    return [WorkItem(p, i) for i, p in enumerate(prompts())]


def test_stepped_answers_are_those_of_generate(tiny: CAFe):
    want = [tiny.generate(p.conversation, max_new_tokens=p.max_new_tokens) for p in prompts()]
    assert all(want), "empty answers show nothing"
    answers = finished(ChatDecoding(tiny), items())
    assert [answers[i].text for i in range(3)] == want


def test_what_runs_between_two_steps_changes_nothing(tiny: CAFe):
    """Embeddings, and prompts that join and leave."""
    want = finished(ChatDecoding(tiny), items())
    vector = tiny.encode("a red cat")
    calls, decoding = CafeCalls(tiny), ChatDecoding(tiny)
    others: dict[int, Completion] = {}
    steps = iter(range(100))

    def between() -> None:
        found = calls.embed([WorkItem(user("a red cat"))])[0].vector
        assert np.allclose(found / np.linalg.norm(found), vector, atol=1e-5)
        if (step := next(steps)) < 3:
            decoding.admit({10 + step: items()[step]})

    answers = finished(decoding, items(), between)
    others = {row - 10: answer for row, answer in answers.items() if row >= 10}
    assert {row: answer for row, answer in answers.items() if row < 10} == want
    assert others == want


def test_a_dropped_row_ends_and_leaves_the_others_alone(tiny: CAFe):
    want = finished(ChatDecoding(tiny), items())
    decoding = ChatDecoding(tiny)
    dropped = iter([True])
    answers = finished(decoding, items(), lambda: next(dropped, False) and decoding.drop(0))
    assert answers == {1: want[1], 2: want[2]}


def test_when_all_rows_are_dropped_nothing_is_written(tiny: CAFe):
    decoding = ChatDecoding(tiny)
    assert len(decoding.admit({7: items()[0]})) == 1
    decoding.drop(7)
    assert decoding.step() == []


def test_a_row_that_fails_leaves_the_others_alone(tiny: CAFe):
    want = finished(ChatDecoding(tiny), items())
    bad = WorkItem(Prompt(user("a"), 9, bias={10**9: 1.0}))
    decoding = ChatDecoding(tiny)
    events = decoding.admit({5: bad} | dict(enumerate(items())))
    assert [str(e.error) for e in events if e.error] == [
        "logit_bias: the model has no token 1000000000"
    ]
    answers = {e.row: e.answer for e in events if e.answer is not None}
    while events := decoding.step():
        answers |= {e.row: e.answer for e in events if e.answer is not None}
    assert answers == want


def test_prompts_that_cannot_be_read_are_not_admitted(tiny: CAFe, monkeypatch: pytest.MonkeyPatch):
    """Also when the forward fails on the way."""
    want = finished(ChatDecoding(tiny), items())
    decoding = ChatDecoding(tiny)
    forward = tiny.model.model.forward
    failing = iter([False, True])

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        if next(failing, False):
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny.model.model, "forward", sometimes)
    first = decoding.admit({0: items()[0]})
    with pytest.raises(RuntimeError, match="memory"):
        decoding.admit({1: items()[1]})
    answers = {e.row: e.answer for e in first if e.answer is not None}
    while events := decoding.step():
        answers |= {e.row: e.answer for e in events if e.answer is not None}
    assert answers == {0: want[0]}


def test_a_prompt_without_room_for_an_answer_is_refused(tiny: CAFe):
    words = " ".join(["cat"] * tiny.collator.max_tokens)
    decoding = ChatDecoding(tiny)
    with pytest.raises(DataError, match="input 3: the prompt leaves no room"):
        decoding.admit({0: WorkItem(Prompt(user(words), 5), 3)})
    assert decoding.step() == []


def test_an_answer_ends_where_the_model_cannot_see_further(tiny: CAFe):
    room = 4
    frame = tiny.collator.prompt_rows([user("cat")])[0].input_ids.shape[1]
    words = " ".join(["cat"] * (tiny.collator.max_tokens - frame - room + 1))
    item = WorkItem(Prompt(user(words), 50, temperature=2.0, seed=1))
    (answer,) = finished(ChatDecoding(tiny), [item]).values()
    assert answer.prompt_tokens == tiny.collator.max_tokens - room
    assert answer.new_tokens <= room


def test_penalties_of_the_generation_config_count_as_in_generate(
    babbling_model: CAFe, monkeypatch: pytest.MonkeyPatch
):
    config = babbling_model.model.generation_config
    asked = [WorkItem(Prompt(p.conversation, 24), i) for i, p in enumerate(prompts())]
    plain = finished(ChatDecoding(babbling_model), asked)
    monkeypatch.setattr(config, "repetition_penalty", 1.3)
    monkeypatch.setattr(config, "no_repeat_ngram_size", 2)
    want = [babbling_model.generate(p.conversation, max_new_tokens=24) for p in prompts()]
    answers = finished(ChatDecoding(babbling_model), asked)
    assert [answers[i].text for i in range(3)] == want
    assert answers != plain, "without effect, so nothing is shown"


def test_a_text_that_is_too_long_to_embed_is_refused_not_cut(tiny: CAFe):
    words = " ".join(["cat"] * tiny.collator.max_tokens)
    with pytest.raises(DataError, match=r"input 5: \d+ tokens exceed the model's limit"):
        CafeCalls(tiny).embed([WorkItem(user(words), 5)])


def test_batched_scores_are_those_of_score(tiny: CAFe):
    texts = ["a red cat", "two dogs and a cake"]
    images = [sample_image(1), sample_image(2)]
    pairs = [(p, t) for p in images for t in texts]
    items = [WorkItem(match_question(user(Image(p)), user(t)), i) for i, (p, t) in enumerate(pairs)]
    want = np.concatenate([tiny.score(p, texts) for p in images])
    assert np.ptp(want) > 0
    got = [1 / (1 + math.exp(-s.value)) for s in CafeCalls(tiny).score(items)]
    assert np.allclose(got, want, atol=1e-5)


# ---------------------------------------------------------------------- sampling


def test_probabilities_are_a_softmax_at_a_temperature():
    scores = torch.tensor([1.0, 2.0, 3.0]).log()
    assert torch.allclose(probabilities(scores, 1.0, 1.0), torch.tensor([1, 2, 3]) / 6)
    assert torch.allclose(probabilities(scores, 0.5, 1.0), torch.tensor([1, 4, 9]) / 14)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, [2]), (0.5, [2]), (0.51, [1, 2]), (0.84, [0, 1, 2]), (1.0, [0, 1, 2])]
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: list[int]):
    p = probabilities(torch.tensor([1.0, 2.0, 3.0]).log(), 1.0, top_p)  # 1/6, 2/6, 3/6
    assert torch.nonzero(p).flatten().tolist() == kept


def sampler(prompt: Prompt) -> RowSampler:
    made = RowSampler.of(prompt, [0], torch.device("cpu"))
    assert made is not None
    return made


def test_simply_greedy_rows_have_no_sampler():
    assert RowSampler.of(Prompt(user("a"), 5), [0], torch.device("cpu")) is None
    scores = torch.randn(10)
    assert sampler(Prompt(user("a"), 5, logprobs=0))(scores) == int(scores.argmax())


def test_sampling_follows_the_probabilities():
    choice = sampler(Prompt(user("a"), 5, temperature=1.0, seed=0))
    scores = torch.tensor([1.0, 2.0, 3.0]).log()
    draws = [choice(scores) for _ in range(3000)]
    found = np.bincount(draws, minlength=3) / 3000
    assert np.abs(found - np.array([1, 2, 3]) / 6).max() < 5 * (0.25 / 3000) ** 0.5


def test_a_seed_gives_the_same_answer_in_any_company(tiny: CAFe):
    def answered(*asked: Prompt) -> dict[int, Completion]:
        return finished(ChatDecoding(tiny), [WorkItem(p) for p in asked])

    seeded = Prompt(user("Describe this image."), 12, temperature=1.5, seed=3)
    (alone,) = answered(seeded).values()
    company = Prompt(user("Describe this image."), 12, temperature=2.0)
    assert answered(company, seeded)[1] == alone
    assert answered(replace(seeded, seed=4))[0] != alone
