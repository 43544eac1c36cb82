"""LLaVA-OneVision: an image's two equal views are computed once, with transformers' features."""

from __future__ import annotations

import PIL.Image
import pytest
import torch

from cafe.model.vlm import CAFe
from helpers.images import noise

SQUARE, WIDE = noise(1), noise(2, 120, 50)


@pytest.mark.parametrize(
    "shown",
    [
        [[SQUARE]],
        [[WIDE]],
        [[SQUARE], [noise(4)]],
        [[SQUARE], [WIDE], [noise(5, 300, 300)], [noise(6, 20, 90)]],
        [[SQUARE, WIDE], [noise(7), SQUARE, noise(8)]],
    ],
)
def test_features_are_those_of_transformers_and_equal_views_are_seen_once(
    small_model: CAFe, shown: list[list[PIL.Image.Image]]
):
    inputs = small_model.family.process_images(small_model.processor, shown).inputs
    inner = small_model.model.model
    seen: list[int] = []
    handle = inner.vision_tower.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    try:
        with torch.inference_mode():
            found = small_model.family.image_features(inner, inputs)
            want = inner.get_image_features(**inputs, return_dict=True).pooler_output
    finally:
        handle.remove()
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-6
    once, all_views = seen
    squares = sum(len(group) == 1 and group[0].width == group[0].height for group in shown)
    assert all_views - once == squares
