"""The published families, built once and loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.real import build_hub

FAMILIES = ("llava_onevision", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="session", params=FAMILIES)
def published_dir(request: pytest.FixtureRequest, hub: Path) -> Path:
    return hub / request.param


@pytest.fixture(scope="session")
def published(published_dir: Path) -> Any:
    """The loaded model. Tests leave it as it is."""
    import torch

    from cafe.model.vlm import CAFe

    return CAFe.from_pretrained(published_dir, dtype=torch.float32, device="cpu")
