"""The shipped recipes, on the true models' configurations and on small copies of them.

The configurations under `configs/` are written out by hand from the published ones, with what
decides the shapes; nothing is downloaded. On the meta device a model of 8 billion parameters costs
nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import cafe.recipes
from cafe.model.families import family_of
from cafe.planning.counts import held_memory
from cafe.recipes import Recipe, load_recipe
from cafe.training.optim import freeze, parts_of
from cafe.training.run import train
from cafe.training.tuning import adapt
from helpers import builders
from helpers.models import build_small_model

FOLDER = Path(cafe.recipes.__file__).parent
CONFIGS = Path(__file__).parent / "configs"
# Recipe -> the true configuration, and the family of its small copy.
SHIPPED = {
    "llava-onevision-0.5b": ("llava-onevision-qwen2-0.5b", "llava_onevision"),
    "llava-onevision-7b": ("llava-onevision-qwen2-7b", "llava_onevision"),
    "mmeb-llava-onevision-0.5b": ("llava-onevision-qwen2-0.5b", "llava_onevision"),
    "mmeb-qwen3-vl-2b-lora": ("qwen3-vl-2b", "qwen3_vl"),
    "smolvlm-256m": ("smolvlm-256m", "idefics3"),
}
OF_TINY = {"caption", "demo", "ablate", "own-words"}
# Millions, and how far the true number may be away. The first two: MMEB's leaderboard on CAFe's
# models; the others: their names.
PUBLISHED = {
    "llava-onevision-qwen2-0.5b": (894, 0.5),
    "llava-onevision-qwen2-7b": (8030, 5),
    "qwen3-vl-2b": (2000, 200),
    "smolvlm-256m": (256, 1),
}


def recipe_of(name: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.yaml")


def header_of(name: str) -> str:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line for line in lines[: lines.index("")])


def on_meta(name: str, recipe: Recipe) -> Any:
    """The true model without weights, tuned as the recipe says; a `CAFe` without processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(CONFIGS / SHIPPED[name][0])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    core: Any = SimpleNamespace(model=model, family=family_of(config))
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(not parameter_name.startswith(core.family.unused(config)))
    adapt(core, recipe.tuning, recipe.model)
    freeze(parts_of(core), recipe.optimizer.freeze)
    return core


def test_every_recipe_is_in_these_tests() -> None:
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert names == set(SHIPPED) | OF_TINY


@pytest.mark.parametrize("name", SHIPPED)
def test_every_tuned_part_of_the_true_model_is_there_and_learns(name: str) -> None:
    recipe = recipe_of(name)
    core = on_meta(name, recipe)
    for part, parameters in parts_of(core).items():
        learned = [p for p in parameters.values() if p.requires_grad]
        tuned = recipe.tuning.parts if recipe.tuning.kind != "full" else list(core.family.parts)
        assert bool(learned) == (part in tuned and part not in recipe.optimizer.freeze), part


@pytest.mark.parametrize("name", SHIPPED)
def test_the_header_names_the_true_numbers_of_parameters(name: str) -> None:
    core = on_meta(name, recipe_of(name))
    parameters = list(core.model.parameters())
    learned = sum(p.numel() for p in parameters if p.requires_grad) / 1e6
    adapters = sum(p.numel() for n, p in core.model.named_parameters() if "lora_" in n) / 1e6
    total = sum(p.numel() for p in parameters) / 1e6
    published, tolerance = PUBLISHED[SHIPPED[name][0]]
    assert total - adapters == pytest.approx(published, abs=tolerance)
    text = " ".join(header_of(name).replace("#", " ").split())
    assert f"{total:,.1f} M parameters, {learned:,.1f} M trainable." in text
    held = held_memory(
        recipe_of(name).model_copy(update={"model": str(CONFIGS / SHIPPED[name][0])})
    )
    assert held.trained == round(learned * 1e6)
    if recipe_of(name).tuning.kind == "full":
        moving = 4 * held.trained + held.gradients + held.moments
        assert f"16 bytes each, {moving / 1e9:,.1f} GB" in text


@pytest.mark.parametrize("name", SHIPPED)
def test_the_header_says_what_memory_and_which_numbers(name: str) -> None:
    header = header_of(name)
    for word in ("cafe train", "# Parameters", "# Memory", "# Targets"):
        assert word in header
    assert ("Computed, not measured" in header) != ("Measured on" in header)


def test_mmeb_sources_are_the_twenty_training_sets_capped_at_50k() -> None:
    for name in ("mmeb-llava-onevision-0.5b", "mmeb-qwen3-vl-2b-lora"):
        sources = recipe_of(name).data
        assert len({source.path for source in sources}) == 20
        assert sum(source.weight for source in sources) == 662
        assert {(s.mode, s.limit, s.split) for s in sources} == {
            ("pair", 50_000, "diverse_instruction")
        }


def test_caption_sources_are_the_published_six() -> None:
    for name in ("llava-onevision-0.5b", "llava-onevision-7b"):
        sources = recipe_of(name).data
        assert len({source.path for source in sources}) == 6
        assert sum(source.weight for source in sources) == pytest.approx(247.9)
        assert {source.mode for source in sources} == {"caption"}


# ---------------------------------------------------------------------- two steps, small


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, captions, and pairs as MMEB writes them."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
    question = {"from": "human", "value": "<image>\nDescribe this image."}
    records = [
        {
            "image": f"{i}.png",
            "conversations": [question, {"from": "gpt", "value": f"a big red cat {i}"}],
        }
        for i in range(8)
    ]
    (folder / "captions.json").write_text(json.dumps(records))
    pairs = [
        {
            "qry": f"<|image_1|>\nIs it a cat? {i}",
            "qry_image_path": f"{i}.png",
            "pos_text": f"yes {i}" if i % 2 else "<|image_1|>\nRepresent the given image.\n",
            "pos_image_path": "" if i % 2 else f"{(i + 1) % 8}.png",
            "neg_text": "",
            "neg_image_path": "",
        }
        for i in range(8)
    ]
    pq.write_table(pa.Table.from_pylist(pairs), folder / "pairs.parquet")
    return folder


@pytest.fixture(scope="module")
def small_copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    copies = {name: builders.build(name, folder / name) for name in ("qwen3_vl", "idefics3")}
    build_small_model().save_pretrained(folder / "llava_onevision")
    return {**copies, "llava_onevision": folder / "llava_onevision"}


def shrunken(name: str, model: Path, world: Path, out: Path) -> Recipe:
    """The recipe with another model, data of eight records, and small numbers; the rest stays."""
    tree = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    data = dict(tree["data"][0])
    data |= {"path": str(world / ("pairs.parquet" if data["mode"] == "pair" else "captions.json"))}
    data = {k: v for k, v in data.items() if k not in {"split", "image_root", "limit"}}
    tree |= {
        "model": str(model),
        "output_dir": str(out),
        "data": [data],
        "log": {"progress": False},
    }
    tree["batch"] |= {"examples": 4, "chunk": 2, "max_tokens": 1024, "workers": 0}
    tree["schedule"] = {**tree["schedule"], "epochs": None, "steps": 2, "warmup": 0}
    tree["optimizer"] = {key: float(v) for key, v in tree["optimizer"].items()}
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree))
    return load_recipe(file)


def moved(before: Any, after: Any) -> Iterator[str]:
    """Names of the parameters that are not the same in two models."""
    own = dict(after.named_parameters())
    for name, parameter in before.named_parameters():
        if not torch.equal(parameter.float(), own[name].float()):
            yield name


@pytest.mark.parametrize("name", SHIPPED)
def test_two_steps_of_a_small_copy_move_what_the_recipe_tunes(
    name: str, small_copies: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    from cafe.model.vlm import CAFe

    base = small_copies[SHIPPED[name][1]]
    recipe = shrunken(name, base, world, tmp_path / "run")
    whole = recipe_of(name)
    assert recipe.objective == whole.objective
    assert recipe.tuning == whole.tuning
    result = train(recipe)
    assert [record.step for record in result.records] == [1, 2]
    for record in result.records:
        assert math.isfinite(record.contrastive)
        assert record.contrastive > 0
        assert record.language > 0

    before, after = CAFe.from_pretrained(base), CAFe.from_pretrained(result.model_dir)
    if recipe.tuning.kind == "lora":
        from cafe.model.checkpoint.adapter import merge_into_base

        merge_into_base(after.model)
    changed = list(moved(before.model, after.model))
    tuned = recipe.tuning.parts if recipe.tuning.kind != "full" else list(before.family.parts)
    for part, prefixes in before.family.parts.items():
        some = any(n.startswith(prefixes) for n in changed)
        assert some == (part in tuned and part not in recipe.optimizer.freeze), part
    assert after.encode("a cat").shape == (before.embedding_dimension,)


def test_hub_names_have_the_form_that_the_reader_takes() -> None:
    for name in SHIPPED:
        for source in recipe_of(name).data:
            assert re.fullmatch(r"hub:[\w-]+/[\w.-]+:[\w().-]+", source.path)
