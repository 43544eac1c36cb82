"""LLaVA-NeXT (v1.6): CLIP tower, two-layer projector, anyres tiles; Mistral, Llama or Qwen2.

Every image gives an overview and tiles, also among other images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image
from torch import Tensor

from cafe.model.families.base import Family, ProcessedImages, flat, tower_above


class LlavaNext(Family):
    model_type = "llava_next"
    parts = {  # noqa: RUF012 - facts, never written to
        "vision": ("model.vision_tower.",),
        "projector": ("model.multi_modal_projector.", "model.image_newline"),
        "language": ("model.language_model.", "lm_head."),
    }

    def process_images(
        self, processor: Any, groups: Sequence[Sequence[PIL.Image.Image]]
    ) -> ProcessedImages:
        images = flat(groups)
        inputs = processor.image_processor(images, do_pad=True, return_tensors="pt")
        return ProcessedImages(
            inputs=dict(inputs),
            placeholders=[processor.replace_image_token(inputs, i) for i in range(len(images))],
        )

    def image_features(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        return list(model.get_image_features(**inputs, return_dict=True).pooler_output)

    def unused(self, config: Any) -> tuple[str, ...]:
        return tower_above(config, "model.vision_tower.")
