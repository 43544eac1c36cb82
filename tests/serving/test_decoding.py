"""Generation in steps: the same tokens as in one go, whatever is computed between two steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from cafe.errors import DataError
from cafe.model.rows.matching import match_question
from cafe.model.vlm import CAFe
from cafe.serving.decoding import Generation, Lockstep
from cafe.serving.messages import Completion, Prompt, WorkItem
from cafe.serving.model_calls import CafeCalls
from cafe.serving.sampling import PerRowSampler, probabilities
from cafe.types import Image, user
from helpers.images import sample_image


def prompts() -> list[Prompt]:
    describe, ask = "Describe this image.", "How many objects are there?"
    return [
        Prompt(user(Image(sample_image(1)), describe), 24),
        Prompt(user("Write two sentences about a cat."), 9),
        Prompt(user(Image(sample_image(2)), ask), 24),
    ]


def finished(generation: Generation, between: Any = lambda: None) -> dict[int, Completion]:
    answers = {}
    while not generation.finished:
        for event in generation.step():
            if event.answer is not None:
                answers[event.row] = event.answer
        between()
    return answers


def test_stepped_answers_are_those_of_generate(tiny: CAFe):
    asked = prompts()
    want = [tiny.generate(p.conversation, max_new_tokens=p.max_new_tokens) for p in asked]
    assert all(want), "empty answers show nothing"
    answers = finished(Generation(tiny, [WorkItem(p, i) for i, p in enumerate(asked)]))
    assert [answers[i].text for i in range(3)] == want


def test_what_runs_between_two_steps_changes_nothing(tiny: CAFe):
    """Embeddings, and a second generation in lockstep with the first."""
    asked = [WorkItem(p, i) for i, p in enumerate(prompts())]
    want = finished(Generation(tiny, asked))
    vector = tiny.encode("a red cat")
    calls, other = CafeCalls(tiny), Generation(tiny, asked[::-1])
    others: dict[int, Completion] = {}

    def between() -> None:
        found = calls.embed([WorkItem(user("a red cat"))])[0].vector
        assert np.allclose(found / np.linalg.norm(found), vector, atol=1e-5)
        if not other.finished:
            others.update({e.row: e.answer for e in other.step() if e.answer is not None})

    assert finished(Generation(tiny, asked), between) == want
    assert not other.finished or len(others) == 3
    others |= finished(other)
    assert {2 - row: answer for row, answer in others.items()} == want


def test_a_dropped_row_ends_and_leaves_the_others_alone(tiny: CAFe):
    asked = [WorkItem(p, i) for i, p in enumerate(prompts())]
    want = finished(Generation(tiny, asked))
    generation = Generation(tiny, asked)
    generation.step()
    generation.drop(0)
    answers = finished(generation)
    assert answers == {1: want[1], 2: want[2]}


def test_a_generation_whose_rows_are_all_dropped_ends_with_the_next_step(tiny: CAFe):
    generation = Generation(tiny, [WorkItem(prompts()[0])])
    assert len(generation.step()) == 1
    generation.drop(0)
    assert generation.step() == []
    assert generation.finished


def test_a_prompt_without_room_for_an_answer_is_refused(tiny: CAFe):
    words = " ".join(["cat"] * tiny.collator.max_tokens)
    generation = Generation(tiny, [WorkItem(Prompt(user(words), 5), 3)])
    with pytest.raises(DataError, match="input 3: the prompt leaves no room"):
        generation.step()
    assert generation.finished


def test_an_answer_ends_where_the_model_cannot_see_further(tiny: CAFe):
    room = 4
    frame = tiny.collator.prompt_rows([user("cat")])[0].input_ids.shape[1]
    words = " ".join(["cat"] * (tiny.collator.max_tokens - frame - room + 1))
    (answer,) = finished(
        Generation(tiny, [WorkItem(Prompt(user(words), 50, temperature=2.0, seed=1))])
    ).values()
    assert answer.prompt_tokens == tiny.collator.max_tokens - room
    assert answer.new_tokens <= room


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


def test_greedy_rows_are_left_alone_and_sampled_rows_have_one_token():
    asked = [Prompt(user("a"), 5), Prompt(user("b"), 5, temperature=1.0, seed=0)]
    scores = torch.randn(2, 10)
    chosen = PerRowSampler(asked, torch.device("cpu"))(torch.zeros(2, 1), scores.clone())
    assert torch.equal(chosen[0], scores[0])
    assert torch.isfinite(chosen[1]).sum() == 1


def test_sampling_follows_the_probabilities():
    asked = [Prompt(user("a"), 5, temperature=1.0, seed=0)]
    choice = PerRowSampler(asked, torch.device("cpu"))
    scores = torch.tensor([[1.0, 2.0, 3.0]]).log()
    draws = [int(choice(torch.zeros(1, 1), scores.clone()).argmax()) for _ in range(3000)]
    found = np.bincount(draws, minlength=3) / 3000
    assert np.abs(found - np.array([1, 2, 3]) / 6).max() < 5 * (0.25 / 3000) ** 0.5


def test_a_seed_gives_the_same_answer_in_any_company(tiny: CAFe):
    seeded = Prompt(user("Describe this image."), 12, temperature=1.5, seed=3)
    (alone,) = finished(Generation(tiny, [WorkItem(seeded)])).values()
    company = [Prompt(user("Describe this image."), 12, temperature=2.0), seeded]
    assert finished(Generation(tiny, [WorkItem(p) for p in company]))[1] == alone
    other = Prompt(user("Describe this image."), 12, temperature=1.5, seed=4)
    assert finished(Generation(tiny, [WorkItem(other)]))[0] != alone


def test_lockstep_takes_turns_and_hands_errors_over():
    seen: list[str] = []

    def run(pause: Any) -> None:
        seen.append("a")
        pause()
        seen.append("b")
        raise ValueError("c")

    steps = Lockstep(run)
    assert seen == []
    steps.advance()
    assert (seen, steps.finished) == (["a"], False)
    with pytest.raises(ValueError, match="c"):
        steps.advance()
    assert (seen, steps.finished) == (["a", "b"], True)
