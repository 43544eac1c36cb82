"""Every family's tiny model, written to disk once and loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import builders
from helpers.models import in_float64


@pytest.fixture(scope="session", params=builders.NAMES)
def family_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers alone writes it."""
    return builders.build(request.param, tmp_path_factory.mktemp("families") / request.param)


@pytest.fixture(scope="session")
def family_model(family_dir: Path) -> Any:
    """That checkpoint in float64, in evaluation mode. Tests leave it as they find it."""
    from cafe.model.vlm import CAFe

    return in_float64(CAFe.from_pretrained(family_dir, dtype=torch.float64, device="cpu"))
