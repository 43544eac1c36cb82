"""Token vectors in the step: gradients of separate passes, and a head that changes nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from cafe.errors import CheckpointError, RecipeError
from cafe.model.multi_vector import (
    add_token_projection,
    new_token_projection,
    token_projection_of,
)
from cafe.model.vlm import CAFe
from cafe.recipes import Objective, Recipe
from cafe.release.release import merge_adapter
from cafe.training.run import train
from cafe.training.tuning import prepare_token_projection
from cafe.types import Example, user
from helpers.match_twin import match_pass
from helpers.models import build_small_model, in_float64
from helpers.processes import free_port
from helpers.ranks import step_of, worker
from helpers.runs import Killed, die_after, equal, make_world, recipe, weights, without_times
from helpers.twin import (
    all_states,
    gradients,
    make_examples,
    run_step,
    three_passes,
    worst_difference,
)

EXACT = 1e-9
PLAIN = Objective(contrastive_weight=0.7, language_weight=1.3)
LATE = PLAIN.model_copy(
    update={
        "multi_vector_weight": 0.5,
        "multi_vector_dim": 16,
        "multi_vector_dims": [4, 16],
        "multi_vector_temperature": 0.07,
    }
)


@pytest.fixture(scope="module")
def model() -> Any:
    model = build_small_model()
    add_token_projection(model.model, new_token_projection(64, 16))
    return in_float64(model)


def slow_scores(query: list[Tensor], target: list[Tensor]) -> Tensor:
    """The mean over a query's vectors of the best cosine, one pair of items at a time."""
    return torch.stack([torch.stack([(q @ t.T).amax(1).mean() for t in target]) for q in query])


def vectors_of(model: Any, conversations: list[Any], width: int) -> list[Tensor]:
    render, projection = model.collator.render, token_projection_of(model.model)
    states, lengths = all_states(model, [render.embedding(c, "compress") for c in conversations])
    assert projection is not None
    return [
        functional.normalize((row[:n] @ projection.weight.T)[:, :width])
        for row, n in zip(states, lengths.tolist(), strict=True)
    ]


def late_pass(
    model: Any, examples: list[Example], weight: float, temperature: float = 0.07
) -> Tensor:
    """The MaxSim loss from sequences of their own, backpropagated."""
    own, losses = torch.arange(len(examples)), []
    loose = [n for e in examples for n in e.negatives]
    for width in (4, 16):
        query = vectors_of(model, [e.query for e in examples], width)
        target = vectors_of(model, [e.target for e in examples], width)
        negatives = [v for n in loose for v in vectors_of(model, [n], width)]
        forward = slow_scores(query, [*target, *negatives]) / temperature
        reverse = slow_scores(target, query) / temperature
        losses += [functional.cross_entropy(forward, own), functional.cross_entropy(reverse, own)]
    loss = torch.stack(losses).mean()
    (weight * loss).backward()
    return loss.detach()


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("sharing", ["trie", "none"])
def test_token_vectors_have_the_gradients_of_a_separate_pass(
    model: Any, chunk: int | None, sharing: str
) -> None:
    examples = make_examples(6)
    contrastive, language = three_passes(model, examples, LATE)
    late = late_pass(model, examples, 0.5)
    expected = gradients(model)
    numbers = run_step(model, examples, LATE, chunk, sharing)
    found = gradients(model)
    assert found["model.token_projection.weight"].abs().max() > 1e-3
    assert worst_difference(found, expected) < EXACT
    torch.testing.assert_close(numbers.contrastive, contrastive, rtol=0, atol=1e-10)
    torch.testing.assert_close(numbers.language, language, rtol=0, atol=1e-10)
    torch.testing.assert_close(numbers.multi_vector, late, rtol=0, atol=1e-10)


def test_the_comparison_can_fail(model: Any) -> None:
    examples = make_examples(6)
    three_passes(model, examples, LATE)
    late_pass(model, examples, 0.51)
    expected = gradients(model)
    run_step(model, examples, LATE, 2)
    assert worst_difference(gradients(model), expected) > 1e-4


def test_match_questions_and_rows_in_blocks(model: Any) -> None:
    objective = LATE.model_copy(update={"match_weight": 0.6})
    examples = make_examples(5)
    three_passes(model, examples, objective)
    late_pass(model, examples, 0.5)
    match_pass(model, examples, 0.6)
    expected = gradients(model)
    for chunk in (None, 2):
        run_step(model, examples, objective, chunk, block_cost=0)
        assert worst_difference(gradients(model), expected) < EXACT


def test_hard_negatives_are_columns_and_thoughts_are_not(model: Any) -> None:
    examples = make_examples(4)
    examples[0] = dataclasses.replace(examples[0], negatives=(user("a dog"), user("no cat")))
    examples[3] = dataclasses.replace(examples[3], negatives=(examples[0].query,))
    late = LATE.model_copy(update={"language_weight": 0.0, "thought_weight": 0.3})
    thinking = [dataclasses.replace(e, query_thought=(*e.query, *user("red"))) for e in examples]
    off = late.model_copy(update={"multi_vector_weight": 0.0})
    run_step(model, thinking, off, 2)
    rest = gradients(model)
    # What equals a query or a target is no negative of its pair: here, of the first one.
    loss = late_pass(model, [dataclasses.replace(e, negatives=()) for e in examples], 0.5)
    gradients(model)
    numbers = run_step(model, thinking, late, 2)
    both = gradients(model)
    assert numbers.multi_vector is not None
    assert numbers.multi_vector > loss  # three more columns for the queries
    run_step(model, thinking, late)
    assert worst_difference(gradients(model), both) < EXACT
    assert worst_difference(both, rest) > 1e-3


def test_the_loss_of_a_batch_with_negatives(model: Any) -> None:
    examples = make_examples(3)
    examples[1] = dataclasses.replace(examples[1], negatives=(user("a dog"), user("no cat")))
    expected = late_pass(model, examples, 0.5)
    gradients(model)
    for chunk in (None, 1):
        numbers = run_step(model, examples, LATE, chunk)
        torch.testing.assert_close(numbers.multi_vector, expected, rtol=0, atol=1e-10)
        gradients(model)


def test_dropout_is_replayed() -> None:
    model = build_small_model(dropout=0.3)
    add_token_projection(model.model, new_token_projection(64, 16))
    model = in_float64(model).train()
    examples = make_examples(4)
    torch.manual_seed(5)
    run_step(model, examples, LATE, 2)
    first = gradients(model)
    torch.manual_seed(5)
    run_step(model, examples, LATE, 2)
    assert worst_difference(gradients(model), first) == 0


def test_the_head_alone_changes_nothing_else(model: Any) -> None:
    """With weight 0 the gradients are, bit for bit, those of a model that has no head."""
    examples = make_examples(4)
    run_step(model, examples, PLAIN, 2)
    found = gradients(model)
    assert found.pop("model.token_projection.weight").abs().max() == 0
    bare = in_float64(build_small_model())
    run_step(bare, examples, PLAIN, 2)
    assert all(torch.equal(a, found[name]) for name, a in gradients(bare).items())


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 2], ids=["direct", "cached"])
def test_two_processes_have_the_gradients_of_one(chunk: int, tmp_path: Path) -> None:
    args = (free_port(), chunk, str(tmp_path), 0.0, 0.0, 0.5)
    multiprocessing.spawn(worker, args=args, nprocs=2)
    model, _, numbers = step_of(-1, 0, False, 0.0, 0.0, 0.5)
    expected = gradients(model)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert worst_difference(found["gradients"], expected) < EXACT
        torch.testing.assert_close(found["multi_vector"], numbers.multi_vector)


# ---------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


ON = (
    "objective.multi_vector_weight=1.0",
    "objective.multi_vector_dim=16",
    "schedule.steps=4",
    "optimizer.multi_vector_learning_rate=1e-2",
)


def projection(directory: Path) -> Tensor:
    return load_file(directory / "multi_vector/1_Dense/model.safetensors")["linear.weight"]


@pytest.mark.slow
def test_a_run_trains_and_saves_them_and_resumes_bit_for_bit(world: Path, tmp_path: Path) -> None:
    whole = train(recipe(world, tmp_path / "whole", *ON))
    losses = [record.multi_vector for record in whole.records]
    assert losses[0] is not None
    assert whole.records[0].loss == pytest.approx(
        losses[0] + whole.records[0].contrastive + whole.records[0].language
    )
    killed = recipe(world, tmp_path / "killed", *ON)
    with pytest.raises(Killed):
        train(killed, on_step=die_after(3))
    train(killed, resume=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "killed")
    both = [projection(tmp_path / name / "model") for name in ("whole", "killed")]
    assert torch.equal(*both)
    assert not any("token_projection" in name for name in weights(tmp_path / "whole"))
    vectors = CAFe.from_pretrained(whole.model_dir, device="cpu").encode_tokens("a red cat")
    assert vectors[0].shape[1] == 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("on", "off", "message"),
    [
        (ON[:2], (), r"multi_vector_dim was 16 and is now null"),
        ((), ON[:2], r"multi_vector_dim was null and is now 16"),
        (("objective.latent_tokens=2",), (), r"latent_tokens was 2 and is now null"),
    ],
)
def test_a_run_is_not_resumed_with_or_without_them(
    world: Path, tmp_path: Path, on: tuple[str, ...], off: tuple[str, ...], message: str
) -> None:
    with pytest.raises(Killed):
        train(recipe(world, tmp_path / "run", *on, "schedule.steps=4"), on_step=die_after(3))
    with pytest.raises(CheckpointError, match=message):
        train(recipe(world, tmp_path / "run", *off, "schedule.steps=4"), resume=True)


@pytest.mark.slow
def test_the_projection_alone_can_be_trained(world: Path, tmp_path: Path) -> None:
    """Beside frozen parts: embeddings and answers keep every bit."""
    frozen = "optimizer.freeze=[vision,projector,language]"
    result = train(recipe(world, tmp_path / "run", *ON, frozen))
    assert equal(weights(tmp_path / "run"), load_file(world / "model/model.safetensors"))
    losses = [record.multi_vector or 0.0 for record in result.records]
    longer = train(recipe(world, tmp_path / "next", *ON, frozen, f"model={result.model_dir}"))
    assert (longer.records[0].multi_vector or 0.0) < losses[0]  # it begins with what was learned
    assert not torch.equal(projection(result.model_dir), projection(longer.model_dir))


@pytest.mark.slow
def test_an_adapter_keeps_its_own_projection_until_it_is_merged(
    world: Path, tmp_path: Path
) -> None:
    lora = ("tuning.kind=lora", "tuning.rank=4", "tuning.alpha=8")
    result = train(recipe(world, tmp_path / "run", *ON, *lora))
    assert {p.name for p in (result.model_dir / "multi_vector").iterdir()} == {"1_Dense"}
    model = CAFe.from_pretrained(result.model_dir, device="cpu")
    expected = model.encode_tokens("a red cat")[0]
    merged = merge_adapter(result.model_dir, tmp_path / "merged").directory
    found = CAFe.from_pretrained(merged, device="cpu").encode_tokens("a red cat")[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def recipe_of(**objective: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": "tiny",
            "output_dir": Path("x"),
            "data": [{"path": "x"}],
            "batch": {"examples": 2},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"steps": 1},
            "objective": objective,
        }
    )


def test_a_run_without_them_drops_a_projection_and_one_with_other_dimensions_fails() -> None:
    model = build_small_model()
    prepare_token_projection(model, recipe_of(multi_vector_weight=1.0, multi_vector_dim=8))
    own = token_projection_of(model.model)
    assert own is not None
    assert own.weight.requires_grad
    prepare_token_projection(model, recipe_of(multi_vector_weight=0.5, multi_vector_dim=8))
    assert torch.equal(token_projection_of(model.model).weight, own.weight)  # type: ignore[union-attr]
    with pytest.raises(RecipeError, match=r"multi_vector_dim is 128, and .* have 8 dimensions"):
        prepare_token_projection(model, recipe_of(multi_vector_weight=1.0))
    prepare_token_projection(model, recipe_of())
    assert token_projection_of(model.model) is None


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"multi_vector_dims": [64, 256]}, "multi_vector_dims exceed multi_vector_dim, 128"),
        (
            {"multi_vector_dims": [64], "multi_vector_weight": 0},
            "token vectors; set multi_vector_weight above 0",
        ),
        ({"contrastive_weight": 0.0}, "multi_vector_weight is trained by a contrastive loss"),
        ({"compat": "official"}, "has no multi_vector_weight"),
    ],
)
def test_recipes_that_make_no_sense(objective: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_of(**{"multi_vector_weight": 1.0, **objective})
