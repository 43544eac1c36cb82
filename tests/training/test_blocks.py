"""Recomputed, put away and compiled blocks: the numbers of a plain step, trie and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from cafe.errors import RecipeError
from cafe.model.vlm import CAFe
from cafe.recipes import Objective
from cafe.training.blocks import (
    blocks_of,
    compile_blocks,
    enable_gradient_checkpointing,
    offload_saved_tensors,
)
from cafe.training.run import train
from helpers.models import build_small_model, in_float64
from helpers.runs import make_world, moved, recipe, weights, without_times
from helpers.twin import gradients, make_examples, run_step, three_passes, worst_difference

JOINT = Objective(contrastive_weight=0.7, language_weight=1.3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def test_the_blocks_are_those_of_the_tower_and_of_the_language_model(small_model: Any) -> None:
    names = {id(module): name for name, module in small_model.model.named_modules()}
    assert [names[id(block)] for block in blocks_of(small_model)] == [
        "model.vision_tower.encoder.layers.0",
        "model.language_model.layers.0",
        "model.language_model.layers.1",
    ]


# ---------------------------------------------------------------------- put away


@pytest.mark.parametrize("chunk", [None, 2], ids=["direct", "cached"])
def test_what_is_put_away_comes_back_bit_for_bit(chunk: int | None) -> None:
    model, examples = in_float64(build_small_model()).train(), make_examples(4)
    enable_gradient_checkpointing(model)
    run_step(model, examples, JOINT, chunk)
    expected = gradients(model)
    with offload_saved_tensors(least_bytes=0):
        run_step(model, examples, JOINT, chunk)
    found = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_activations_are_put_away_and_weights_and_small_tensors_are_not() -> None:
    x = torch.ones(4, 8, requires_grad=True)
    weight = torch.ones(8, 8, requires_grad=True)
    mask = torch.ones(4, 8)
    hooks: Any = offload_saved_tensors(least_bytes=4 * 8 * 4)
    packed: list[bool] = []

    def noting(tensor: torch.Tensor) -> Any:
        kept = pack(tensor)
        packed.append(not isinstance(kept, torch.Tensor))
        return kept

    pack, hooks.pack_hook = hooks.pack_hook, noting
    hidden = x * 1.0
    with hooks:
        functional.linear(hidden, weight)  # keeps hidden and weight
        (hidden * mask).sum()  # keeps the mask
        functional.linear(hidden[:1], weight[:1])  # a small one
    assert packed.count(True) == 1
    assert packed.count(False) >= 3


# ---------------------------------------------------------------------- compiled


@pytest.mark.slow
def test_compiled_blocks_have_the_losses_and_gradients_of_three_passes() -> None:
    """Traced and split as for every backend; the code that the default one makes runs below."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()  # type: ignore[attr-defined]  # of other tests
    model, examples = in_float64(build_small_model()).train(), make_examples(3)
    contrastive, language = three_passes(model, examples, JOINT)
    expected = gradients(model)
    compile_blocks(model, backend="aot_eager")
    enable_gradient_checkpointing(model)
    for chunk in (None, 2):  # two lengths, and passes with gradient and without
        numbers = run_step(model, examples, JOINT, chunk)
        torch.testing.assert_close(numbers.contrastive, contrastive)
        torch.testing.assert_close(numbers.language, language)
        assert worst_difference(gradients(model), expected) < 1e-9
    frames = torch._dynamo.utils.counters["frames"]  # type: ignore[attr-defined]
    assert frames["ok"] == frames["total"] > 0, "some block was not compiled"
    assert not torch._dynamo.utils.counters["graph_break"]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_run_with_every_memory_option_trains_what_a_plain_one_trains(
    world: Path, tmp_path: Path
) -> None:
    # Adam's first step is as long for a gradient's rounding as for the gradient, unless epsilon
    # is larger than the rounding.
    steps = ("schedule.steps=2", "batch.chunk=2", "optimizer.epsilon=0.01")
    options = ("compile=true", "gradient_checkpointing=true", "offload_activations=true")
    train(recipe(world, tmp_path / "plain", *steps))
    train(recipe(world, tmp_path / "lean", *steps, *options))
    plain, lean = without_times(tmp_path / "plain"), without_times(tmp_path / "lean")
    for a, b in zip(plain, lean, strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    assert moved(weights(world), weights(tmp_path / "plain"), "") > 1e-3
    assert moved(weights(tmp_path / "plain"), weights(tmp_path / "lean"), "") < 1e-6
    # The saved model is an ordinary one.
    CAFe.from_pretrained(tmp_path / "lean" / "model")


# ---------------------------------------------------------------------- refused


def test_dropout_is_not_compiled(tmp_path: Path) -> None:
    world = make_world(tmp_path, dropout=0.1)
    with pytest.raises(RecipeError, match=r"compile: .*model has dropout.*set compile: false"):
        train(recipe(world, tmp_path / "out", "compile=true"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["offload_activations=true"], "offloads what gradient_checkpointing keeps; set grad"),
        (
            ["attention=flash_attention_2"],
            r"out.yaml: attention is flash_attention_2, whose kernel supports no tree attention "
            r"mask; set attention: flex_attention, which does, or batch.sharing: none",
        ),
        (
            ["attention=flash_attention_2", "batch.sharing=none", "batch.row_tokens=100"],
            "or batch.sharing: none without row_tokens",
        ),
        (
            ["attention=flash_attention_2", "batch.sharing=none"],
            "needs precision: bf16",
        ),
    ],
)
def test_options_that_contradict_each_other_are_one_error(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, tmp_path / "out", *overrides)
