"""Mistral Small 3.1 and later, Ministral 3: Pixtral tower, 2 x 2 patches merged; Mistral.

An image is a grid of any shape. A token of its own ends each line of it, and another one the image,
so its placeholders are as many runs as lines. The tower sees all images as one sequence, with a
mask of its square that separates them: its memory grows with the square of the patches of a chunk.
Ministral 3 scales queries by their position, from the 16,384th token on in the published models.
There, a tool that pads on the left without giving positions does not compute what cafe computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image
from torch import Tensor

from cafe.model.families.base import Family, ProcessedImages, flat, not_thinner


class Mistral3(Family):
    model_type = "mistral3"
    parts = {  # noqa: RUF012 - facts, never written to
        "vision": ("model.vision_tower.",),
        "projector": ("model.multi_modal_projector.",),
        "language": ("model.language_model.", "lm_head."),
    }

    def process_images(
        self, processor: Any, groups: Sequence[Sequence[PIL.Image.Image]]
    ) -> ProcessedImages:
        longest = processor.image_processor.size["longest_edge"]
        images = [not_thinner(image, longest) for image in flat(groups)]
        # The image processor's own `patch_size` is that of patches before they are merged.
        side = processor.patch_size * processor.spatial_merge_size
        inputs = processor.image_processor(images, patch_size=side, return_tensors="pt")
        placeholders = [processor.replace_image_token(inputs, i) for i in range(len(images))]
        return ProcessedImages(inputs=dict(inputs), placeholders=placeholders)

    def image_features(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        return list(model.get_image_features(**inputs, return_dict=True).pooler_output)

    def unused(self, config: Any) -> tuple[str, ...]:
        chosen, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
        chosen = [chosen] if isinstance(chosen, int) else chosen
        highest = max(layer if layer >= 0 else layers + 1 + layer for layer in chosen)
        return tuple(f"model.vision_tower.transformer.layers.{i}." for i in range(highest, layers))
