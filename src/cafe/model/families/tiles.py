"""Families whose tower sees tiles of one size: all tiles of a chunk in one tensor.

The vision tensors include `feature_counts`, int64 [images]: the number of features of each image,
over all of its tiles, taken from the processor's placeholder texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cafe.model.families.base import Family, in_blocks


class TiledFamily(Family):
    """`image_features` and `encoder_output` of such a family."""

    def counts(self, processor: Any, placeholders: Sequence[str]) -> Tensor:
        """Number of features in each placeholder text, int64 [images]."""
        token = processor.tokenizer.convert_ids_to_tokens(self.placeholder_id(processor))
        return torch.tensor([text.count(token) for text in placeholders])

    def image_features(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        vision = {name: tensor for name, tensor in inputs.items() if name != "feature_counts"}
        tiles = model.get_image_features(**vision, return_dict=True).pooler_output
        features = torch.cat(tuple(tiles))
        return list(features.split(inputs["feature_counts"].tolist()))

    def encoder_output(self, features: Sequence[Tensor], hidden: int) -> Any:
        return in_blocks(features)
