"""Gemma3: SigLIP tower, pooled to a fixed number of tokens, which attend to each other both ways.

Most layers attend within a sliding window; distance is counted in the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image

from cafe.model.families.base import ProcessedImages, flat
from cafe.model.families.tiles import TiledFamily


class Gemma3(TiledFamily):
    model_type = "gemma3"
    parts = {  # noqa: RUF012 - facts, never written to
        "vision": ("model.vision_tower.",),
        "projector": ("model.multi_modal_projector.",),
        "language": ("model.language_model.", "lm_head."),
    }
    bidirectional_image_attention = True

    def marker(self, processor: Any) -> str:
        return processor.boi_token

    def placeholder_id(self, processor: Any) -> int:
        # The processor's own `image_token_id` is the marker's.
        return processor.tokenizer.image_token_id

    def process_images(
        self, processor: Any, groups: Sequence[Sequence[PIL.Image.Image]]
    ) -> ProcessedImages:
        images = flat(groups)
        inputs = processor.image_processor(
            images, do_convert_rgb=True, do_pan_and_scan=False, return_tensors="pt"
        )
        placeholders = [processor.replace_image_token(inputs, i) for i in range(len(images))]
        return ProcessedImages(
            inputs={
                "pixel_values": inputs["pixel_values"],
                "feature_counts": self.counts(processor, placeholders),
            },
            placeholders=placeholders,
        )

    def unused(self, config: Any) -> tuple[str, ...]:
        return ("model.vision_tower.head.",)
