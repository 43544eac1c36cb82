"""Token vectors in every family: stock sentence-transformers reads the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from cafe.model.multi_vector import add_token_projection, new_token_projection
from cafe.model.vlm import CAFe
from helpers.builders import NAMES, build

NOISE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 140, 3), dtype=np.uint8))
INPUTS: list[Any] = ["a red cat", NOISE, {"image": NOISE, "text": "what is at the top left"}]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_stock_sentence_transformers_gives_equal_vectors(name: str, tmp_path: Path) -> None:
    from sentence_transformers import MultiVectorEncoder

    model = CAFe.from_pretrained(build(name, tmp_path / "base"), device="cpu")
    torch.manual_seed(0)
    add_token_projection(model.model, new_token_projection(model.embedding_dimension, 16))
    model.save_pretrained(tmp_path / "late")
    theirs = MultiVectorEncoder(str(tmp_path / "late" / "multi_vector"), device="cpu")
    for value, expected in zip(INPUTS, model.encode_tokens(INPUTS), strict=True):
        found = theirs.encode([value], convert_to_numpy=True)[0]
        np.testing.assert_allclose(found, expected, atol=1e-5)
