"""A model knows which prompts its embeddings were trained with, and another one is said once."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from cafe.data.scenes import write_scenes
from cafe.model.rows.prompts import TRAINED_PROMPTS_KEY
from cafe.model.vlm import CAFe
from cafe.recipes import load_recipe
from cafe.training.run import train

RECIPE = """\
model: {model}
output_dir: {folder}/out
data: [{{path: scenes/captions.json, embedding_prompt: none}}]
batch: {{examples: 2, workers: 0}}
optimizer: {{learning_rate: 1e-3}}
schedule: {{steps: 1}}
precision: fp32
log: {{progress: false}}
"""


def trained(folder: Path, small_dir: Path, *overrides: str) -> Path:
    write_scenes(folder / "scenes", 2, seed=3)
    (folder / "r.yaml").write_text(RECIPE.format(model=small_dir, folder=folder))
    return train(load_recipe(folder / "r.yaml", overrides)).model_dir


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_prompts_of_the_pairs_are_saved_and_another_is_said_once(
    tmp_path: Path, small_dir: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    directory = trained(tmp_path, small_dir, f"tuning.kind={kind}")
    if kind == "full":
        config = json.loads((directory / "config.json").read_text())
        assert config[TRAINED_PROMPTS_KEY] == ["none"]
    model = CAFe.from_pretrained(directory, device="cpu")
    with caplog.at_level(logging.WARNING, "cafe"):
        model.encode(["a red mug"], prompt_name="none")
        assert not caplog.messages
        for _ in range(2):
            model.encode(["a red mug"])
    (message,) = caplog.messages
    assert message.startswith("embedding prompt compress: the model was trained with none")


def test_the_model_s_own_prompt_is_the_default_and_without_a_record_nothing_is_said(
    small_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = CAFe.from_pretrained(small_dir, device="cpu")
    with caplog.at_level(logging.WARNING, "cafe"):
        model.encode(["a red mug"], prompt_name="none")
        setattr(model.model.config, TRAINED_PROMPTS_KEY, ["compress"])
        model.encode(["a red mug"])
        assert not caplog.messages
        model.encode(["a red mug"], prompt_name="none")
    assert len(caplog.messages) == 1


def test_a_run_without_pairs_trains_no_prompt(tmp_path: Path, small_dir: Path) -> None:
    directory = trained(tmp_path, small_dir, "objective.contrastive_weight=0")
    config = json.loads((directory / "config.json").read_text())
    assert TRAINED_PROMPTS_KEY not in config
