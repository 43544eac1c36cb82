"""The heart: every parameter gradient of the fast steps equals that of three separate passes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from cafe.recipes import Objective
from cafe.training.state import uses_dropout
from helpers.marks import slow
from helpers.models import build_small_model, in_float64
from helpers.twin import gradients, make_examples, run_step, three_passes, worst_difference

EXACT = 1e-9
JOINT = Objective(contrastive_weight=0.7, language_weight=1.3)


@pytest.fixture(scope="module")
def model() -> Any:
    return in_float64(build_small_model())


def test_trie_step_has_the_losses_and_gradients_of_three_passes(model: Any) -> None:
    examples = make_examples(6)
    contrastive, language = three_passes(model, examples, JOINT)
    expected = gradients(model)
    numbers = run_step(model, examples, JOINT)
    torch.testing.assert_close(numbers.contrastive, contrastive, rtol=0, atol=1e-10)
    torch.testing.assert_close(numbers.language, language, rtol=0, atol=1e-10)
    assert worst_difference(gradients(model), expected) < EXACT
    moved = [name for name, gradient in expected.items() if gradient.abs().max() > 1e-8]
    assert len(moved) > 0.8 * len(expected), "most gradients are zero: nothing was compared"


@pytest.mark.parametrize("chunk", [2, *slow(1, 3, 4, 5)])
@pytest.mark.parametrize("sharing", ["trie", *slow("none")])
def test_cached_step_equals_three_passes_for_any_chunk(
    model: Any, chunk: int, sharing: str
) -> None:
    examples = make_examples(6)
    three_passes(model, examples, JOINT)
    expected = gradients(model)
    run_step(model, examples, JOINT, chunk, sharing)
    assert worst_difference(gradients(model), expected) < EXACT


@pytest.mark.parametrize("chunk", [4, *slow(None)])
@pytest.mark.parametrize("sharing", ["trie", *slow("none")])
def test_rows_in_blocks_of_their_length_have_the_gradients_of_three_passes(
    model: Any, chunk: int | None, sharing: str
) -> None:
    examples = make_examples(6)
    three_passes(model, examples, JOINT)
    expected = gradients(model)
    numbers = run_step(model, examples, JOINT, chunk, sharing, block_cost=0)
    assert numbers.padding == 0 < run_step(model, examples, JOINT, chunk, sharing).padding
    model.zero_grad()
    run_step(model, examples, JOINT, chunk, sharing, block_cost=0)
    assert worst_difference(gradients(model), expected) < EXACT


def test_a_wrong_weight_would_be_seen(model: Any) -> None:
    """The comparison can fail: another contrastive weight moves the gradients."""
    examples = make_examples(6)
    three_passes(model, examples, JOINT)
    expected = gradients(model)
    run_step(model, examples, Objective(contrastive_weight=0.71, language_weight=1.3), 2)
    assert worst_difference(gradients(model), expected) > 1e-4


@pytest.mark.parametrize("chunk", [2, 4])
def test_without_pass_two_negatives_of_other_chunks_gradients_differ(
    model: Any, chunk: int
) -> None:
    """Accumulating chunks without the cache is another loss: negatives would be missing."""
    examples = make_examples(6)
    three_passes(model, examples, JOINT)
    expected = gradients(model)
    for i in range(0, 6, chunk):
        run_step(model, examples[i : i + chunk], JOINT)
    assert worst_difference(gradients(model), expected) > 1e-2


@pytest.mark.parametrize(
    "objective",
    [
        Objective(hardness=5.0, directions="query_to_target"),
        Objective(contrastive="sigmoid", temperature=0.1),
        Objective(matryoshka_dims=[16, 64]),
        Objective(language_weight=0.0),
        Objective(contrastive_weight=0.0),
    ],
    ids=["hardness", "sigmoid", "matryoshka", "contrastive only", "language only"],
)
def test_cached_equals_direct_for_every_objective(model: Any, objective: Objective) -> None:
    examples = make_examples(5)
    direct = run_step(model, examples, objective)
    expected = gradients(model)
    cached = run_step(model, examples, objective, 2)
    assert worst_difference(gradients(model), expected) < EXACT
    torch.testing.assert_close(cached.contrastive, direct.contrastive)
    torch.testing.assert_close(cached.language, direct.language)


def test_hard_negatives_and_pairless_examples_mix(model: Any) -> None:
    examples = make_examples(6)
    examples[1] = dataclasses.replace(examples[1], query=None, target=None)
    examples[2] = dataclasses.replace(examples[2], negatives=(examples[5].target,))
    numbers = run_step(model, examples, JOINT)
    expected = gradients(model)
    assert numbers.pairs == 5
    run_step(model, examples, JOINT, 2)
    assert worst_difference(gradients(model), expected) < EXACT
    without = [*examples[:2], dataclasses.replace(examples[2], negatives=()), *examples[3:]]
    run_step(model, without, JOINT)
    assert worst_difference(gradients(model), expected) > 1e-4


def test_a_chunk_without_images_is_no_exception(model: Any) -> None:
    examples = make_examples(4)
    texts = [
        dataclasses.replace(e, query=e.target, dialogues=(_without_image(e.dialogues[0]),))
        for e in make_examples(2, seed=1)
    ]
    run_step(model, examples + texts, JOINT)
    expected = gradients(model)
    run_step(model, examples + texts, JOINT, 2)
    assert worst_difference(gradients(model), expected) < EXACT


def _without_image(dialogue: Any) -> Any:
    question, answer = dialogue
    return (dataclasses.replace(question, content=question.content[1:]), answer)


@pytest.mark.parametrize("chunk", [2, 4])
def test_cached_step_replays_dropout(chunk: int) -> None:
    """With dropout the reference is the same chunks, seeds and tokens without the cache.

    Both steps draw the same random numbers chunk by chunk, so a slow step that keeps every
    chunk's graph and backpropagates once must have the same gradients.
    """
    model = in_float64(build_small_model(dropout=0.3)).train()
    assert uses_dropout(model), "or this test would be vacuous"
    examples = make_examples(6)
    torch.manual_seed(3)
    expected = _one_graph_over_chunks(model, examples, chunk)
    torch.manual_seed(3)
    run_step(model, examples, JOINT, chunk)
    found = gradients(model)
    assert worst_difference(found, expected) < EXACT
    torch.manual_seed(4)
    run_step(model, examples, JOINT, chunk)
    assert worst_difference(gradients(model), expected) > 1e-3, "dropout changed nothing"


def _one_graph_over_chunks(model: Any, examples: Any, chunk: int) -> dict[str, torch.Tensor]:
    from torch.nn import functional

    parts = [model.collator(examples[i : i + chunk]) for i in range(0, len(examples), chunk)]
    query, target, nll, count = [], [], 0.0, 0
    for part in parts:
        states = model(part.rows, part.vision).flatten(0, 1)
        pooled = states[part.rows.pooled]
        query.append(pooled[: part.pairs])
        target.append(pooled[part.pairs :])
        logits = model.lm_head(states[part.rows.label_source])
        nll = nll + functional.cross_entropy(logits, part.rows.label_ids, reduction="sum")
        count += len(part.rows.label_ids)
    scores = functional.normalize(torch.cat(query)) @ functional.normalize(torch.cat(target)).T * 20
    own = torch.arange(len(examples))
    contrastive = (
        functional.cross_entropy(scores, own) + functional.cross_entropy(scores.T, own)
    ) / 2
    (0.7 * contrastive + 1.3 * nll / count).backward()
    return gradients(model)


def test_random_stream_moves_on_after_a_cached_step() -> None:
    """Two steps in a row must not see the same dropout."""
    model = in_float64(build_small_model(dropout=0.3)).train()
    examples = make_examples(4)
    torch.manual_seed(0)
    run_step(model, examples, JOINT, 2)
    first = gradients(model)
    run_step(model, examples, JOINT, 2)
    assert worst_difference(gradients(model), first) > 1e-3


def test_learned_temperature_gets_the_same_gradient_direct_and_cached(model: Any) -> None:
    from cafe.training.contrastive import ContrastiveLoss
    from cafe.training.step import TrainingStep

    objective = Objective(learn_temperature=True)
    examples = make_examples(4)
    found = []
    for size in (4, 2):
        contrast = ContrastiveLoss(objective).double()
        parts = [model.collator(examples[i : i + size]) for i in range(0, 4, size)]
        TrainingStep(model, model, contrast, objective)(parts)
        gradients(model)
        found.append(contrast.log_temperature.grad)
    assert found[0] is not None
    assert found[0] != 0
    torch.testing.assert_close(found[0], found[1])
