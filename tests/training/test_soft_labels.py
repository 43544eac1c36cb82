"""Soft labels in the step: gradients of separate passes, for both teachers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.nn import functional

from cafe.errors import DataError, RecipeError
from cafe.recipes import Objective, load_recipe
from cafe.training.run import train
from cafe.types import Example, Image, user
from helpers.captioned_noise import write_captioned_noise
from helpers.match_twin import chosen_questions, match_pass, question_odds
from helpers.models import build_small_model, in_float64
from helpers.processes import free_port
from helpers.ranks import scored, step_of, worker
from helpers.twin import (
    gradients,
    last_states,
    make_examples,
    run_step,
    three_passes,
    worst_difference,
)

EXACT = 1e-9
PLAIN = Objective(contrastive_weight=0.7, language_weight=1.3)
STORED = PLAIN.model_copy(update={"soft_label_weight": 0.8, "soft_label_temperature": 0.5})
MATCHER = PLAIN.model_copy(
    update={"match_weight": 0.6, "soft_label_weight": 0.8, "soft_labels": "matcher"}
)


@pytest.fixture(scope="module")
def model() -> Any:
    return in_float64(build_small_model())


def embedded(model: Any, side: Any) -> Tensor:
    return last_states(model, [model.collator.render.embedding(side, "compress")])[0]


def divergence(anchor: Tensor, candidates: list[Tensor], scores: Tensor) -> Tensor:
    near = [functional.cosine_similarity(anchor, candidate, dim=0) for candidate in candidates]
    student = torch.log_softmax(torch.stack(near) / 0.05, 0)
    return functional.kl_div(student, torch.softmax(scores, 0), reduction="sum")


def stored_pass(model: Any, examples: list[Example]) -> Tensor:
    losses = []
    for e in examples:
        if e.scores is not None and e.negatives:
            sides = [embedded(model, side) for side in (e.target, *e.negatives)]
            scores = torch.tensor(e.scores, dtype=torch.float64) / 0.5
            losses.append(divergence(embedded(model, e.query), sides, scores))
    loss = torch.stack(losses).mean()
    (0.8 * loss).backward()
    return loss.detach()


def key(side: Any) -> object:
    part = side[0].content[0]
    return part.key if isinstance(part, Image) else part


def matcher_pass(model: Any, examples: list[Example]) -> Tensor:
    """Every question anew, as a sequence of its own; embeddings anew for every comparison."""
    with torch.no_grad():
        questions = chosen_questions(model, examples)
        odds = question_odds(model, questions)
    negatives = {key(n) for e in examples for n in e.negatives}
    losses = []
    for side in (0, 1):
        for anchor in {key(q[side]): q[side] for q in questions}.values():
            asked = [i for i, q in enumerate(questions) if key(q[side]) == key(anchor)]
            if key(anchor) in negatives or len(asked) < 2:
                continue
            others = [embedded(model, questions[i][1 - side]) for i in asked]
            losses.append(divergence(embedded(model, anchor), others, odds[asked]))
    loss = torch.stack(losses).mean()
    (0.8 * loss).backward()
    return loss.detach()


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_stored_scores_have_the_gradients_of_separate_passes(model: Any, chunk: int | None) -> None:
    examples = [scored(e) for e in make_examples(6)]
    assert {len(e.negatives) for e in examples} == {0, 1, 2}
    run_step(model, examples, PLAIN)
    expected = gradients(model)
    soft = stored_pass(model, examples)
    more = gradients(model)
    expected = {name: expected[name] + more[name] for name in expected}
    numbers = run_step(model, examples, STORED, chunk)
    assert worst_difference(gradients(model), expected) < EXACT
    torch.testing.assert_close(numbers.soft_label, soft, rtol=0, atol=1e-10)
    assert soft > 0.01


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("negatives", [False, True])
def test_the_matcher_as_teacher_has_the_gradients_of_separate_passes(
    model: Any, chunk: int | None, negatives: bool
) -> None:
    examples = make_examples(6)
    if negatives:
        examples[1] = dataclasses.replace(examples[1], negatives=(user("a dog"), user("no cat")))
        run_step(model, examples, PLAIN)
    else:
        three_passes(model, examples, PLAIN)
    match_pass(model, examples, 0.6)
    soft = matcher_pass(model, examples)
    expected = gradients(model)
    numbers = run_step(model, examples, MATCHER, chunk)
    assert worst_difference(gradients(model), expected) < EXACT
    torch.testing.assert_close(numbers.soft_label, soft, rtol=0, atol=1e-10)
    assert soft > 0.01


def test_the_comparison_can_fail(model: Any) -> None:
    examples = make_examples(6)
    run_step(model, examples, MATCHER, 2)
    expected = gradients(model)
    run_step(model, examples, MATCHER.model_copy(update={"soft_label_weight": 0.81}), 2)
    assert worst_difference(gradients(model), expected) > 1e-4
    run_step(model, examples, MATCHER.model_copy(update={"soft_label_temperature": 1.1}), 2)
    assert worst_difference(gradients(model), expected) > 1e-5


def test_texts_as_queries_and_pairs_without_an_image(model: Any) -> None:
    """The embeddings that a question is about stand elsewhere when the text is the query."""
    examples = make_examples(6)
    for i in (1, 4):
        e = examples[i]
        examples[i] = dataclasses.replace(e, query=e.target, target=e.query)
    examples.append(Example("texts", query=user("a cat"), target=user("the big cat")))
    plain = run_step(model, examples, MATCHER.model_copy(update={"soft_label_weight": 0.0}))
    assert plain.soft_label is None
    matcher_pass(model, examples)
    expected = gradients(model)
    for chunk in (None, 3):
        run_step(model, examples, MATCHER, chunk)
        assert worst_difference(gradients(model), expected) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["scores", "matcher"])
def test_two_processes_have_the_gradients_of_one(teacher: str, tmp_path: Path) -> None:
    match = 0.6 if teacher == "matcher" else 0.0
    args = (free_port(), 2, str(tmp_path), match, 0.0, 0.0, teacher)
    multiprocessing.spawn(worker, args=args, nprocs=2)
    model, contrast, numbers = step_of(-1, 0, False, match, 0.0, 0.0, teacher)
    expected = gradients(model)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert worst_difference(found["gradients"], expected) < 1e-9
        torch.testing.assert_close(found["soft_label"], numbers.soft_label)
        torch.testing.assert_close(found["temperature"], contrast.log_temperature.grad)
    assert numbers.soft_label > 0.01


# ---------------------------------------------------------------------- recipes and data


def scored_recipe(folder: Path, model: Path, scores: Any, objective: str) -> Path:
    """Six captions with two hard negatives each, and a teacher's scores of most."""
    file = write_captioned_noise(folder)
    records = json.loads(file.read_text())
    for i, record in enumerate(records):
        record["negatives"] = ["a wrong text", f"another one {i}"]
        if i % 3:
            record["teacher"] = scores
    file.write_text(json.dumps(records))
    recipe = folder / "r.yaml"
    recipe.write_text(
        f"model: {model}\noutput_dir: {folder}/out\ndata: [{{path: {file}, scores: teacher}}]\n"
        f"objective: {objective}\nbatch: {{examples: 4, chunk: 3, workers: 0}}\n"
        "max_rejected: 0\noptimizer: {learning_rate: 1e-3}\nschedule: {steps: 2}\n"
        "log: {progress: false, trackers: []}\n"
    )
    return recipe


def test_a_run_reads_the_column_and_logs_the_loss(small_dir: Path, tmp_path: Path) -> None:
    recipe = scored_recipe(tmp_path, small_dir, [3.5, 1, -2], "{soft_label_weight: 0.5}")
    seen: list[Any] = []
    train(load_recipe(recipe), on_step=seen.append)
    for record in seen:
        assert record.soft_label > 0
        whole = record.contrastive + record.language + 0.5 * record.soft_label
        assert record.loss == pytest.approx(whole)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["soft_label"] for line in log] == pytest.approx([r.soft_label for r in seen])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 2.0], "'teacher' holds 2 numbers, expected 3"),
        (["high", 1, 2], "'teacher' holds a string, expected a list of finite numbers"),
        ([True, 1, 2], "'teacher' holds true or false"),
        ([float("inf"), 1, 2], "expected a list of finite numbers"),
        ([float("nan"), 1, 2], "expected a list of finite numbers"),
        ([10**400, 1, 2], "'teacher' holds a number, expected a list of finite numbers"),
        ([1e308, 1, -1e308], "expected a list of finite numbers"),
        (3.0, "holds 1 numbers, expected 3"),
    ],
)
def test_scores_that_do_not_fit_are_skipped_with_the_reason(
    small_dir: Path, tmp_path: Path, scores: Any, message: str
) -> None:
    recipe = scored_recipe(tmp_path, small_dir, scores, "{soft_label_weight: 0.5}")
    with pytest.raises(DataError, match=message):
        train(load_recipe(recipe))


def test_nobody_scored_anything(small_dir: Path, tmp_path: Path) -> None:
    recipe = scored_recipe(tmp_path, small_dir, None, "{soft_label_weight: 0.5}")
    with pytest.raises(DataError, match="no pair has scores of two candidates"):
        train(load_recipe(recipe))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contrastive_weight": 0.0}, "soft_label_weight is trained by a contrastive loss"),
        ({"soft_labels": "matcher"}, "soft_labels: matcher needs match questions"),
        ({"compat": "official"}, "compat is official, which has no soft_label_weight"),
    ],
)
def test_objectives_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(soft_label_weight=0.5, **settings)


@pytest.mark.parametrize(
    ("source", "objective", "message"),
    [
        ("scores: teacher", "{}", "soft_label_weight above 0"),
        ("limit: 5", "{soft_label_weight: 1.0}", "scores of a source, the name of a column"),
        (
            "scores: teacher",
            "{soft_label_weight: 1.0, soft_labels: matcher, match_weight: 1.0}",
            "with soft_labels: scores",
        ),
    ],
)
def test_scores_and_their_weight_go_together(
    source: str, objective: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(
        f"model: tiny\noutput_dir: out\ndata: [{{path: x.json, {source}}}]\n"
        f"objective: {objective}\nbatch: {{examples: 2}}\n"
        "optimizer: {learning_rate: 1e-3}\nschedule: {steps: 1}\n"
    )
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.yaml")
