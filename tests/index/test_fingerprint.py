"""The fingerprint sees every tensor and every header, and no name of a file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cafe.errors import CheckpointError
from cafe.index.fingerprint import prompt_fingerprint, weights_fingerprint

TENSORS = {f"layer{i}.weight": np.full((50, 40), i, np.float32) for i in range(5)}


def written(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_copy_under_other_names_is_the_same_model(tmp_path: Path):
    one = written(tmp_path / "one", TENSORS)
    two = tmp_path / "two"
    shutil.copytree(one, two)
    (two / "model.safetensors").rename(two / "weights.safetensors")
    assert weights_fingerprint([one]) == weights_fingerprint([two])


@pytest.mark.parametrize("name", list(TENSORS))
def test_a_training_step_of_any_tensor_is_another_model(tmp_path: Path, name: str):
    one = weights_fingerprint([written(tmp_path / "one", TENSORS)])
    changed = {**TENSORS, name: TENSORS[name] + np.float32(1e-3)}
    assert weights_fingerprint([written(tmp_path / "two", changed)]) != one


def test_shapes_names_and_an_adapter_beside_are_seen(tmp_path: Path):
    one = written(tmp_path / "one", TENSORS)
    reshaped = {k: v.reshape(40, 50) for k, v in TENSORS.items()}
    renamed = {k + "x": v for k, v in TENSORS.items()}
    adapter = written(tmp_path / "adapter", {"a": np.ones(3, np.float32)})
    prints = {
        weights_fingerprint([one]),
        weights_fingerprint([written(tmp_path / "two", reshaped)]),
        weights_fingerprint([written(tmp_path / "three", renamed)]),
        weights_fingerprint([adapter, one]),
    }
    assert len(prints) == 4


def test_what_is_no_weights_file_is_an_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no \\*\\.safetensors weights"):
        weights_fingerprint([tmp_path])
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="cannot be read"):
        weights_fingerprint([tmp_path])


def test_the_prompt_counts_and_the_longest_input_does_not(small_model: Any):
    contract = small_model.embedding_contract()
    own = prompt_fingerprint(contract)
    assert prompt_fingerprint({**contract, "max tokens": "7"}) == own
    assert prompt_fingerprint({**contract, "embedding prompt (text)": "other"}) != own
