"""The facts of each family, held against the real model."""

from __future__ import annotations

from typing import Any

import PIL.Image
import pytest
import torch
from transformers import AutoConfig

from cafe.errors import FamilyError
from cafe.model.families import family_of
from cafe.model.families.base import Family


def test_an_unknown_family_says_what_is_missing():
    with pytest.raises(FamilyError) as caught:
        family_of(AutoConfig.for_model("qwen2"))
    message = str(caught.value)
    assert "model type 'qwen2'" in message
    assert "it knows llava_onevision" in message
    for fact in ("module prefixes", "marker", "token id repeated per feature", "per-image"):
        assert fact in message
    assert Family.what_is_needed() in message


def test_the_parts_cover_every_parameter_exactly_once(small_model: Any):
    parts = family_of(small_model.model.config).parts
    assert set(parts) == {"vision", "projector", "language"}
    found: dict[str, int] = dict.fromkeys(parts, 0)
    # Tied weights too: a head that is the embedding belongs where the embedding belongs.
    for name, _ in small_model.model.named_parameters(remove_duplicate=False):
        owners = [part for part, prefixes in parts.items() if name.startswith(prefixes)]
        assert len(owners) == 1, (name, owners)
        found[owners[0]] += 1
    assert all(count >= 2 for count in found.values()), found


def test_every_prefix_of_a_part_is_there(small_model: Any):
    names = [n for n, _ in small_model.model.named_parameters(remove_duplicate=False)]
    for prefixes in family_of(small_model.model.config).parts.values():
        for prefix in prefixes:
            assert any(name.startswith(prefix) for name in names), prefix


def test_the_marker_and_the_placeholder_are_tokens_of_their_own(small_model: Any):
    family, processor = small_model.family, small_model.processor
    marker = family.marker(processor)
    ids = processor.tokenizer(f"a{marker}b", add_special_tokens=False)["input_ids"]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids(marker)) == 1
    assert family.placeholder_id(processor) == small_model.model.config.image_token_index


@pytest.mark.parametrize(
    "size", [(1, 1), (96, 96), (200, 1), (1, 200), (97, 31), (30, 95), (640, 480), (1000, 999)]
)
@pytest.mark.parametrize("company", [False, True])
def test_there_are_as_many_features_as_placeholders(
    small_model: Any, size: tuple[int, int], company: bool
):
    """Where they differ, transformers fails deep inside with a message about neither."""
    group = [PIL.Image.new("RGB", size), PIL.Image.new("RGB", (50, 60))][: 1 + company]
    processed = small_model.family.process_images(small_model.processor, [group])
    with torch.inference_mode():
        features = small_model.family.image_features(small_model.model.model, processed.inputs)
    marker = small_model.family.marker(small_model.processor)
    expected = [text.count(marker) for text in processed.placeholders]
    assert [len(f) for f in features] == expected
    assert "".join(processed.placeholders).replace(marker, "") == ""


def test_features_of_several_groups_are_those_of_each(small_model: Any):
    images = [PIL.Image.effect_noise(size, 90).convert("RGB") for size in ((96, 96), (50, 20))]
    family, processor, inner = small_model.family, small_model.processor, small_model.model.model

    def features(groups: list[list[PIL.Image.Image]]) -> list[torch.Tensor]:
        with torch.inference_mode():
            return family.image_features(inner, family.process_images(processor, groups).inputs)

    together = features([[images[0]], [images[1]], images])
    apart = [*features([[images[0]]]), *features([[images[1]]]), *features([images])]
    assert len(together) == len(apart) == 4
    for a, b in zip(together, apart, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-5
    assert family.features_depend_on_image_count()
    assert together[0].shape != together[2].shape
