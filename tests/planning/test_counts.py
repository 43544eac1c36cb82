"""What a run holds between two steps, counted without weights, against a run's own tensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from cafe.errors import CheckpointError, RecipeError
from cafe.planning.counts import check_can_fit, held_memory
from cafe.planning.gpus import GPU, find_gpu, known_gpus
from cafe.recipes import Recipe, load_recipe
from cafe.training.build import build_accelerator, build_step
from cafe.training.tuning import load_model

RECIPE = """\
model: {model}
output_dir: out
data: [{{path: none.json}}]
batch: {{examples: 2}}
optimizer: {{learning_rate: 1e-3}}
schedule: {{steps: 1}}
precision: fp32
"""
TINY_GPU = GPU("tiny", 1e-6, 1, 1, "made up")


def recipe_of(folder: Path, model: Path | str, *overrides: str) -> Recipe:
    path = folder / "r.yaml"
    path.write_text(RECIPE.format(model=model))
    return load_recipe(path, list(overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["tuning.kind=lora", "tuning.rank=4"],
        ["tuning.kind=lora", "tuning.rank=4", "precision=bf16"],
        ["optimizer.freeze=[vision]"],
        ["objective.language_weight=0"],
    ],
)
def test_the_counts_are_the_bytes_of_a_run(
    overrides: list[str], small_dir: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, small_dir, *overrides)
    vlm = load_model(recipe, torch.device("cpu"))
    _, state = build_step(recipe, vlm, build_accelerator(recipe))
    learned = [p for p in vlm.model.parameters() if p.requires_grad]
    for parameter in learned:
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    moments = [
        value
        for slots in state.optimizer.state.values()
        for value in slots.values()
        if value.ndim  # without the step counters
    ]
    held = held_memory(recipe)
    assert held.weights == sum(p.nbytes for p in vlm.model.parameters())
    assert held.gradients == sum(p.nbytes for p in learned)
    assert held.moments == sum(m.nbytes for m in moments) > 0
    assert held.trained == sum(p.numel() for p in learned)


def test_no_weights_are_needed_and_shards_share_the_bytes(small_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(small_dir / "config.json", bare)
    whole = held_memory(recipe_of(tmp_path, small_dir))
    recipe = recipe_of(tmp_path, bare, "sharding=fsdp")
    assert held_memory(recipe) == whole
    half = held_memory(recipe, processes=2)
    assert half.sharded
    assert half.total == pytest.approx(whole.total / 2, abs=3)
    assert held_memory(recipe_of(tmp_path, bare), processes=2).total == whole.total


def test_what_can_never_fit_is_said_with_what_would(small_dir: Path, tmp_path: Path) -> None:
    held = held_memory(recipe_of(tmp_path, small_dir))
    check_can_fit(held, find_gpu("h100"))
    with pytest.raises(RecipeError, match=r"cannot fit.*sharding: fsdp over at least \d+"):
        check_can_fit(held, TINY_GPU)


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'h10': not in the table; the nearest are h100"):
        find_gpu("h10")
    assert find_gpu(" H100") is known_gpus()["h100"]
    assert all(gpu.source for gpu in known_gpus().values())
    with pytest.raises(CheckpointError, match=r"nobody/nothing.*nor found on the hub"):
        held_memory(recipe_of(tmp_path, "nobody/nothing"))
    with pytest.raises(RecipeError, match="qlora"):
        held_memory(recipe_of(tmp_path, "tiny", "tuning.kind=qlora"))
