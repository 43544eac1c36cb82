"""What `compat: official` trained is what the saved directory asks for, with every tool."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cafe.errors import CheckpointError
from cafe.model.vlm import CAFe
from cafe.release.release import export, probe_inputs
from cafe.release.verify import verify
from cafe.training.run import train
from cafe.types import user
from helpers.runs import make_world, recipe

START, END = "<|im_start|>", "<|im_end|>"
SYSTEM = f"{START}system\nYou are a helpful assistant.{END}\n"
TRAINED = (
    f"{SYSTEM}{START}user\na red mugCompress this sentence in one word:{END}\n"
    f"{START}assistant\n{END}"
)
SHORT = ("objective.compat=official", "schedule.steps=1", "checkpoint.every_steps=null")
ADAPTER = ("tuning.kind=lora", "tuning.rank=4", "tuning.alpha=8")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def official(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe(world, tmp_path_factory.mktemp("runs") / "out", *SHORT)).model_dir


def asked(model: CAFe) -> str:
    return model.collator.render.embedding(user("a red mug"), "compress").text


def test_the_default_prompt_is_the_trained_one(official: Path, world: Path) -> None:
    model = CAFe.from_pretrained(official, dtype=torch.float32)
    assert json.loads((official / "config.json").read_text())["embedding_prompt"] == "official"
    assert asked(model) == TRAINED
    probes = probe_inputs()
    trained = model.encode(probes, prompt_name="official")
    assert np.array_equal(model.encode(probes), trained)
    assert model.embedding_contract()["embedding prompt (text)"] == TRAINED
    base = CAFe.from_pretrained(world / "model", dtype=torch.float32)
    assert asked(base) == (
        f"{START}user\na red mug\nCompress this sentence in one word:{END}\n{START}assistant\n{END}"
    )


def test_answers_are_asked_for_in_the_trained_template(official: Path) -> None:
    render = CAFe.from_pretrained(official).collator.render
    prompt = f"{START}user\nWhat?{END}\n{START}assistant\n"
    assert render.prompt(user("What?")).text == SYSTEM + prompt
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    written = render.processor.apply_chat_template(own, tokenize=False, add_generation_prompt=True)
    assert written == f"{START}system\nBe brief.{END}\n{prompt}"


def test_every_tool_embeds_as_was_trained(official: Path) -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("fastapi")
    assert len(verify(official).agreements) == 3


def test_an_adapter_and_its_merge_keep_the_prompt(world: Path, tmp_path: Path) -> None:
    adapter = train(recipe(world, tmp_path / "out", *SHORT, *ADAPTER)).model_dir
    assert asked(CAFe.from_pretrained(adapter)) == TRAINED
    export(adapter, tmp_path / "merged", merge=True)
    assert asked(CAFe.from_pretrained(tmp_path / "merged")) == TRAINED


def test_training_on_keeps_the_prompt(official: Path, world: Path, tmp_path: Path) -> None:
    settings = (f"model={official}", *SHORT[1:])
    again = train(recipe(world, tmp_path / "out", *settings)).model_dir
    assert asked(CAFe.from_pretrained(again)) == TRAINED


def test_without_a_contrastive_loss_the_prompt_stays(world: Path, tmp_path: Path) -> None:
    settings = (*SHORT, "objective.contrastive_weight=0")
    written = train(recipe(world, tmp_path / "out", *settings)).model_dir
    assert CAFe.from_pretrained(written).collator.own_prompt == "compress"


def test_a_prompt_that_is_not_known_is_refused(official: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    for file in official.iterdir():
        (directory / file.name).symlink_to(file)
    config = json.loads((official / "config.json").read_text()) | {"embedding_prompt": "other"}
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="embedding_prompt is 'other'"):
        CAFe.from_pretrained(directory)
