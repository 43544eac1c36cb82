"""What `precision: auto` becomes in a run: recorded, reported, and compared on a resume."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from cafe import precision
from cafe.errors import RecipeError
from cafe.recipes import Recipe, load_recipe
from cafe.training import build
from cafe.training.run import train
from helpers.runs import equal, make_world, recipe, recipe_file, weights

OLD, NEW = frozenset({"avx2"}), frozenset({"avx2", "avx512_f", "avx512_bf16"})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch):
    """A function that gives this machine other instructions."""
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)

    def pretend(instructions: frozenset[str]) -> None:
        monkeypatch.setattr(precision, "detected", lambda: instructions)

    return pretend


def silent_recipe(world: Path, out: Path, *overrides: str) -> Recipe:
    """One step; the recipe says nothing about precision."""
    file = recipe_file(world, out)
    file.write_text(file.read_text().replace("precision: fp32\n", ""))
    return load_recipe(file, ["schedule.steps=1", *overrides])


def manifest(out: Path, step: int = 1) -> Path:
    return out / "checkpoints" / f"step-{step:06d}" / "manifest.json"


def trained_in(out: Path, step: int = 1) -> str:
    return json.loads(manifest(out, step).read_text())["precision"]


def test_by_default_a_cpu_without_bf16_trains_in_fp32(
    world: Path, tmp_path: Path, cpu, caplog: pytest.LogCaptureFixture
):
    cpu(OLD)
    with caplog.at_level(logging.INFO, "cafe.training"):
        train(silent_recipe(world, tmp_path / "auto"))
    assert caplog.messages == ["precision: auto is fp32 on this CPU (AVX2)"]
    assert trained_in(tmp_path / "auto") == "fp32"
    train(recipe(world, tmp_path / "fp32", "schedule.steps=1"))
    assert equal(weights(tmp_path / "auto"), weights(tmp_path / "fp32"))
    kept = load_recipe(tmp_path / "auto" / "recipe.yaml")
    assert kept.precision == "auto", "it may be trained again on another machine"


@pytest.mark.slow
def test_by_default_a_cpu_with_bf16_trains_in_it(
    world: Path, tmp_path: Path, cpu, caplog: pytest.LogCaptureFixture
):
    cpu(NEW)
    with caplog.at_level(logging.INFO, "cafe.training"):
        train(silent_recipe(world, tmp_path / "auto"))
    said = "precision: auto is bf16 on this CPU (AVX2, AVX-512, avx512_bf16)"
    assert caplog.messages == [said]
    assert trained_in(tmp_path / "auto") == "bf16"
    train(recipe(world, tmp_path / "bf16", "schedule.steps=1", "precision=bf16"))
    assert equal(weights(tmp_path / "auto"), weights(tmp_path / "bf16"))


def test_bf16_that_is_asked_for_and_emulated_is_warned_of_once(
    world: Path, tmp_path: Path, cpu, caplog: pytest.LogCaptureFixture
):
    cpu(OLD)
    train(recipe(world, tmp_path / "out", "schedule.steps=1", "precision=bf16"))
    assert caplog.messages == [
        "warning: this CPU only emulates bf16 (AVX2), about 20 times slower than fp32; "
        "set precision=auto, or fp32"
    ]
    assert trained_in(tmp_path / "out") == "bf16", "a request is granted"


def test_a_resume_in_another_precision_names_both(
    world: Path, tmp_path: Path, cpu, caplog: pytest.LogCaptureFixture
):
    out = tmp_path / "out"
    cpu(NEW)
    train(silent_recipe(world, out))
    cpu(OLD)
    train(silent_recipe(world, out, "schedule.steps=2"), resume=True)
    (message,) = [m for m in caplog.messages if "differ" in m]
    assert "step-000001 was trained in bf16, and this run continues in fp32" in message
    assert "set precision=bf16 for the same" in message
    assert trained_in(out, step=2) == "fp32"
    caplog.clear()
    train(silent_recipe(world, out, "schedule.steps=2"), resume=True)
    assert caplog.messages == []


def test_a_checkpoint_of_an_earlier_version_is_resumed_as_before(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    out = tmp_path / "out"
    train(recipe(world, out, "schedule.steps=1", "precision=bf16"))
    caplog.clear()
    content = json.loads(manifest(out).read_text())
    del content["precision"]
    manifest(out).write_text(json.dumps(content))
    train(recipe(world, out, "schedule.steps=2"), resume=True)
    assert caplog.messages == []


def test_flash_attention_takes_auto_where_it_is_bf16(world: Path, tmp_path: Path, cpu):
    flash = recipe(
        world,
        tmp_path / "out",
        *("attention=flash_attention_2", "batch.sharing=none", "precision=auto"),
    )
    cpu(NEW)
    assert build.precision_in_use(build.build_accelerator(flash)) == "bf16"
    cpu(OLD)
    with pytest.raises(RecipeError, match=r"needs bf16, and precision: auto is fp32 .*\(cpu\)"):
        train(flash)


def test_processes_that_resolve_auto_differently_are_an_error(
    world: Path, tmp_path: Path, cpu, monkeypatch: pytest.MonkeyPatch
):
    cpu(OLD)
    monkeypatch.setattr(build, "any_rank", lambda flag, device: True)
    with pytest.raises(RecipeError, match=r"auto is fp32 on this machine \(AVX2\), and another"):
        build.build_accelerator(silent_recipe(world, tmp_path / "out"))
