"""What a run holds between two steps, counted without weights, against a run's own tensors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cafe.errors import CheckpointError, RecipeError
from cafe.planning.counts import held_memory
from cafe.planning.gpus import GPU, find_gpu, known_gpus
from cafe.planning.plan import plan
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


def test_the_plan_says_what_fits_and_what_other_settings_hold(
    small_dir: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, small_dir)
    held = held_memory(recipe)
    report = plan(recipe, gpu="h100", count=2)
    assert report.held == held_memory(recipe, processes=2)
    assert report.fits
    assert [x.change for x in report.changes] == [
        "sharding=fsdp",
        "tuning.kind=lora",
        "optimizer.freeze=[vision]",
    ]
    for change in report.changes:
        changed = recipe_of(tmp_path, small_dir, change.change)
        assert change.held == held_memory(changed, processes=2), change
        assert change.held.total < held.total
    small = replace(report, gpu=GPU("small", held.total / 1.5e9, "made up"))
    assert not small.fits
    assert "cannot fit" in str(small)
    assert "can fit" in str(small)  # two halves do
    assert json.loads(report.json())["held"]["total_bytes"] == held.total
    assert plan(recipe).fits is None


def test_what_a_recipe_does_already_is_no_change(small_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, small_dir, "tuning.kind=lora", "sharding=fsdp")
    assert plan(recipe, count=2).changes == ()
    with pytest.raises(RecipeError, match="count"):
        plan(recipe, count=0)


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'h10': not in the table; the nearest are h100"):
        find_gpu("h10")
    assert find_gpu(" H100") is known_gpus()["h100"]
    assert all(gpu.source for gpu in known_gpus().values())
    with pytest.raises(CheckpointError, match=r"nobody/nothing.*nor found on the hub"):
        held_memory(recipe_of(tmp_path, "nobody/nothing"))
    with pytest.raises(RecipeError, match="qlora"):
        held_memory(recipe_of(tmp_path, "tiny", "tuning.kind=qlora"))
