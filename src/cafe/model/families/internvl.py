"""InternVL, transformers' own port: tiles and a thumbnail, pixel shuffle; Qwen2 or Qwen3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image

from cafe.media import Clip
from cafe.model.families.base import ProcessedImages, flat, one_by_one
from cafe.model.families.tiles import TiledFamily


class InternVL(TiledFamily):
    model_type = "internvl"
    parts = {  # noqa: RUF012 - facts, never written to
        "vision": ("model.vision_tower.",),
        "projector": ("model.multi_modal_projector.",),
        "language": ("model.language_model.", "lm_head."),
    }

    def process_images(
        self, processor: Any, groups: Sequence[Sequence[PIL.Image.Image]]
    ) -> ProcessedImages:
        images = flat(groups)
        # The processor always crops, whatever the image processor's configuration says.
        inputs = processor.image_processor(images, crop_to_patches=True, return_tensors="pt")
        placeholders = [processor.replace_image_token(inputs, i) for i in range(len(images))]
        return ProcessedImages(
            inputs={
                "pixel_values": inputs["pixel_values"],
                "feature_counts": self.counts(processor, placeholders),
            },
            placeholders=placeholders,
        )

    def video_marker(self, processor: Any) -> str:
        return processor.video_token

    def process_videos(self, processor: Any, clips: Sequence[Clip]) -> ProcessedImages:
        """Each frame is an image of one tile, named by the text before it."""
        frames, placeholders = one_by_one(processor, clips)
        return ProcessedImages(
            inputs={
                "pixel_values": frames,
                "feature_counts": self.counts(processor, placeholders),
            },
            placeholders=placeholders,
        )

    def unused(self, config: Any) -> tuple[str, ...]:
        layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
        if layer == -1:
            return ()
        tower = "model.vision_tower."
        highest = layer if layer >= 0 else layers + 1 + layer
        above = tuple(f"{tower}encoder.layer.{i}." for i in range(highest, layers))
        return (*above, f"{tower}layernorm.")
