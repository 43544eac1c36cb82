"""Match questions in the second pass: gradients of separate passes, and who is asked what."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from cafe.errors import RecipeError, TrainingError
from cafe.model.judging import judge
from cafe.model.rows.matching import match_question
from cafe.recipes import Objective
from cafe.training.contrastive import gathered_batch
from cafe.training.matching import Matcher, check_matchable
from cafe.types import Example, user
from helpers.marks import slow
from helpers.match_twin import chosen_questions, match_pass
from helpers.models import build_small_model, in_float64
from helpers.processes import free_port
from helpers.ranks import examples_of, step_of, worker
from helpers.twin import gradients, make_examples, run_step, three_passes, worst_difference

EXACT = 1e-9
PLAIN = Objective(contrastive_weight=0.7, language_weight=1.3)
MATCHING = PLAIN.model_copy(update={"match_weight": 0.6})


@pytest.fixture(scope="module")
def model() -> Any:
    return in_float64(build_small_model())


@pytest.mark.parametrize("chunk", [4, *slow(None, 1, 5)])
@pytest.mark.parametrize("sharing", ["trie", *slow("none")])
def test_the_step_has_the_gradients_of_separate_passes(
    model: Any, chunk: int | None, sharing: str
) -> None:
    examples = make_examples(6)
    contrastive, language = three_passes(model, examples, MATCHING)
    match, right = match_pass(model, examples, 0.6)
    expected = gradients(model)
    numbers = run_step(model, examples, MATCHING, chunk, sharing)
    assert worst_difference(gradients(model), expected) < EXACT
    torch.testing.assert_close(numbers.contrastive, contrastive, rtol=0, atol=1e-10)
    torch.testing.assert_close(numbers.language, language, rtol=0, atol=1e-10)
    torch.testing.assert_close(numbers.match, match, rtol=0, atol=1e-10)
    assert right.count(True) == 6 <= right.count(False) <= 12


def test_the_comparison_can_fail(model: Any) -> None:
    examples = make_examples(6)
    three_passes(model, examples, MATCHING)
    match_pass(model, examples, 0.6)
    expected = gradients(model)
    run_step(model, examples, PLAIN.model_copy(update={"match_weight": 0.61}), 2)
    assert worst_difference(gradients(model), expected) > 1e-4


@pytest.mark.slow
def test_the_rest_of_the_gradient_stays_as_it_is(model: Any) -> None:
    examples = make_examples(5)
    run_step(model, examples, PLAIN, 2)
    plain = gradients(model)
    match_pass(model, examples, 0.6)
    match = gradients(model)
    run_step(model, examples, MATCHING, 2)
    both = gradients(model)
    rest = {name: both[name] - match[name] for name in both}
    assert worst_difference(rest, plain) < EXACT


@pytest.mark.parametrize("sharing", ["trie", "none"])
def test_rows_in_blocks_and_without_answers(model: Any, sharing: str) -> None:
    examples = make_examples(6)
    embedding_only = MATCHING.model_copy(update={"language_weight": 0.0})
    run_step(model, examples, embedding_only, None, sharing)
    expected = gradients(model)
    numbers = run_step(model, examples, embedding_only, 4, sharing, block_cost=0)
    assert worst_difference(gradients(model), expected) < EXACT
    assert numbers.padding == 0


def mixed_examples() -> list[Example]:
    """Pairs both ways, two captions of an image, a repeated text, hard negatives, no pair."""
    e = make_examples(9)
    turned = [dataclasses.replace(x, query=x.target, target=x.query) for x in e[6:]]
    e[1] = dataclasses.replace(e[1], query=e[0].query)
    e[3] = dataclasses.replace(e[3], target=e[2].target)
    e[4] = dataclasses.replace(e[4], negatives=(user("a small dog 4"), e[5].query))
    e[5] = dataclasses.replace(e[5], query=None, target=None)
    texts = dataclasses.replace(e[0], id="texts", query=user("a b"), target=user("c d"))
    turned[0] = dataclasses.replace(turned[0], negatives=(e[4].query, user("unlike an image")))
    turned[2] = dataclasses.replace(turned[2], target_id="g")
    alike = dataclasses.replace(make_examples(1, seed=3)[0], id="alike", target_id="g")
    return [*e[:6], texts, *turned, alike]


@pytest.mark.parametrize("chunk", [3, *slow(None)])
def test_what_is_asked_is_what_the_definition_says(model: Any, chunk: int | None) -> None:
    """Including images of hard negatives; a known caption of an image is never wrong."""
    examples = mixed_examples()
    questions = chosen_questions(model, examples)
    assert sum(right for _, _, right in questions) == 9
    run_step(model, examples, PLAIN, chunk)
    plain = gradients(model)
    loss, _ = match_pass(model, examples, 0.6)
    match = gradients(model)
    numbers = run_step(model, examples, MATCHING, chunk)
    both = gradients(model)
    torch.testing.assert_close(numbers.match, loss, rtol=0, atol=1e-10)
    assert worst_difference({n: both[n] - plain[n] for n in both}, match) < 1e-8


def test_an_image_that_all_texts_like_is_asked_about_the_nearest_only(model: Any) -> None:
    """Four of them (`MOST_PER_IMAGE`), besides its own choice: a row stays bounded."""
    examples = make_examples(12)
    collator = dataclasses.replace(model.collator, matching=True)
    chunk = collator(examples)
    vectors = torch.eye(12, 16, dtype=torch.float64)
    target = vectors.clone()
    target[:, 12:] = 0.01 * torch.rand(12, 4, dtype=torch.float64)
    query = vectors.clone()
    query[0] += 5 * target[1:].sum(0)  # near to all other texts
    batch = gathered_batch([chunk], [torch.cat([query, target])])
    plan = Matcher.of(model).plan([chunk], batch)
    about = [q for q in plan.questions[0] if q.head == 0]
    assert [q.right for q in about].count(True) == 1
    assert 4 <= [q.right for q in about].count(False) <= 5


def test_its_odds_are_those_that_score_reads(model: Any) -> None:
    examples = make_examples(3)
    image, text = examples[0].query, examples[1].target
    question, vision = model.collator.prompt_rows([match_question(image, text)])
    states = model.hidden_at(question, vision)
    found = Matcher.of(model).log_odds(states, model.lm_head)
    read = judge(model, image[0].content[0], [text[0].text], 8, "question")
    torch.testing.assert_close(found.float(), read)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 2], ids=["one chunk", "cached"])
def test_two_processes_have_the_gradients_of_one(chunk: int, tmp_path: Path) -> None:
    """Texts of one rank are asked about images of the other."""
    multiprocessing.spawn(worker, args=(free_port(), chunk, str(tmp_path), 0.6), nprocs=2)
    model, _, numbers = step_of(-1, 0, wrapped=False, match_weight=0.6)
    expected = gradients(model)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert worst_difference(found["gradients"], expected) < 1e-9
        torch.testing.assert_close(found["match"], numbers.match)
    alone = [chosen_questions(model, examples_of(rank)) for rank in (0, 1)]
    together = chosen_questions(model, examples_of(-1))
    assert len([*alone[0], *alone[1]]) != len(together) or {
        (i[0].content[0].key, t[0].text) for half in alone for i, t, _ in half
    } != {(i[0].content[0].key, t[0].text) for i, t, _ in together}, "ranks would do as well alone"


def test_a_question_that_is_too_long_is_not_asked_rather_than_cut(model: Any) -> None:
    """Cut, it would end before "Answer yes or no", and a right and a wrong text could be equal."""
    examples = make_examples(4)
    longest = " ".join(["cat"] * 40)
    examples[0] = dataclasses.replace(examples[0], target=user(longest))
    whole, _ = model.collator.prompt_rows([match_question(examples[1].query, examples[1].target)])
    limit = whole.tokens + 4
    collator = dataclasses.replace(model.collator, matching=True, max_tokens=limit)
    examples = [dataclasses.replace(e, dialogues=()) for e in examples]
    chunk = collator(examples)
    vectors = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = Matcher.of(model).plan([chunk], gathered_batch([chunk], [vectors]))
    asked = plan.questions[0]
    assert plan.counts[0] == 3, "the right question about the long text is missing"
    text = [model.processor.tokenizer.decode(q.tail) for q in asked]
    assert all("Answer yes or no" in question for question in text)
    assert not any("cat cat cat" in question for question in text)
    assert chunk.match is not None


# ---------------------------------------------------------------------- bad input


def test_pairs_of_texts_have_no_match_question(model: Any) -> None:
    texts = [
        Example(id=f"{i}", query=user(f"a {i}"), target=user(f"b {i}"), dialogues=())
        for i in range(3)
    ]
    numbers = run_step(model, texts, MATCHING.model_copy(update={"language_weight": 0.0}), 2)
    assert float(numbers.match) == 0
    model.zero_grad()

    class Data:
        steps, examples = 2, texts

        class plan:
            @staticmethod
            def plan(step: int) -> list[int]:
                return [0, 1, 2]

    class Steps:
        data, collator = Data, dataclasses.replace(model.collator, matching=True)

    with pytest.raises(TrainingError, match=r"objective.match_weight: none of the first pairs"):
        check_matchable(Steps)  # type: ignore[arg-type]


def test_dropout_is_refused() -> None:
    dropped = build_small_model(dropout=0.3).train()
    with pytest.raises(RecipeError, match=r"objective.match_weight.*tuning.dropout: 0"):
        Matcher.of(dropped)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contrastive_weight": 0.0}, "match_weight needs embeddings"),
        ({"compat": "official"}, "compat is official"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(match_weight=0.5, **settings)
