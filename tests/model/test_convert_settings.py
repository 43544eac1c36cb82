"""What a LLaVA-NeXT checkpoint's config.json may omit, and what is an error that names the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cafe.errors import CheckpointError
from cafe.model.checkpoint.convert import convert
from helpers.llava_next import make_source


def rewrite_tower(source: Path, *, nested: bool, drop: str | None = None, **changes: Any) -> None:
    """The tower's config.json with changes, nested as in a whole SigLIP or on its own."""
    file = source / "siglip" / "config.json"
    tower = {**json.loads(file.read_text()), **changes}
    tower.pop(drop, None)
    file.write_text(json.dumps({"vision_config": tower} if nested else tower))


@pytest.mark.parametrize("nested", [True, False])
def test_a_size_that_the_towers_config_omits_is_siglips_default(
    nested: bool, tmp_path: Path
) -> None:
    make_source(tmp_path / "source")
    rewrite_tower(tmp_path / "source", nested=nested, drop="num_attention_heads")
    convert(tmp_path / "source", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["vision_config"]
    assert written["num_attention_heads"] == 12  # of transformers' SiglipVisionConfig
    assert written["hidden_size"] == 24  # as stated


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": "24"}, "vision_config.hidden_size is '24', expected a positive whole"),
        ({"patch_size": 0}, "vision_config.patch_size is 0, expected a positive whole number"),
        ({"image_size": None}, "vision_config.image_size is None, expected a positive whole"),
        ({"model_type": "clip_vision_model"}, "vision_config.model_type is 'clip_vision_model'"),
    ],
)
def test_a_wrong_size_of_the_tower_is_named(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    make_source(tmp_path / "source")
    rewrite_tower(tmp_path / "source", nested=True, **changes)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "source", tmp_path / "out")
    assert f"{tmp_path / 'source' / 'siglip' / 'config.json'}: {says}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"vision_config": 3}', "siglip/config.json: vision_config is 3, expected an object"),
        ("[1]", "siglip/config.json: expected an object of settings"),
        ("[" * 100_000, "siglip/config.json: not JSON"),
    ],
)
def test_a_towers_config_that_is_no_object_is_an_error(
    content: str, says: str, tmp_path: Path
) -> None:
    make_source(tmp_path / "source")
    (tmp_path / "source" / "siglip" / "config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "source", tmp_path / "out")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": "32"}, "config.json: hidden_size is '32', expected a positive whole"),
        ({"image_grid_pinpoints": [1, 2]}, "image_grid_pinpoints must be a list of"),
        ({"image_grid_pinpoints": [["a", "b"]]}, "image_grid_pinpoints must be a list of"),
        ({"torch_dtype": "float33"}, "config.json: torch_dtype is 'float33', expected e.g."),
        ({"torch_dtype": "nn"}, "config.json: torch_dtype is 'nn', expected e.g. bfloat16"),
    ],
)
def test_a_wrong_value_of_the_model_is_named(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    make_source(tmp_path / "source", **changes)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "source", tmp_path / "out")
    assert says in str(caught.value)


def test_tiny_is_a_name_here_too_and_needs_no_conversion(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="other models load as they are"):
        convert("tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()
