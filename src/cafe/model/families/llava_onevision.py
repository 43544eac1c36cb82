"""LLaVA-OneVision: SigLIP tower, two-layer projector, Qwen2 language model, anyres tiles.

A picture alone in its prompt gives an overview and tiles; beside others it gives the overview
only (`batch_num_images`), so its features depend on its company.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from cafe.model.families.base import Family, ProcessedImages


class LlavaOnevision(Family):
    model_type = "llava_onevision"
    parts = {  # noqa: RUF012 - facts, never written to
        "vision": ("model.vision_tower.",),
        "projector": ("model.multi_modal_projector.", "model.image_newline"),
        "language": ("model.language_model.", "lm_head."),
    }

    def marker(self, processor: Any) -> str:
        return processor.image_token

    def placeholder_id(self, processor: Any) -> int:
        return processor.image_token_id

    def process_images(
        self, processor: Any, groups: Sequence[Sequence[PIL.Image.Image]]
    ) -> ProcessedImages:
        inputs = processor.image_processor([list(group) for group in groups], return_tensors="pt")
        count = sum(len(group) for group in groups)
        inputs["batch_num_images"] = torch.as_tensor(inputs["batch_num_images"])
        return ProcessedImages(
            inputs=dict(inputs),
            placeholders=[processor.replace_image_token(inputs, i) for i in range(count)],
        )

    def image_features(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        return list(model.get_image_features(**inputs, return_dict=True).pooler_output)

    def unused(self, config: Any) -> tuple[str, ...]:
        layers = config.vision_config.num_hidden_layers
        chosen = config.vision_feature_layer
        chosen = [chosen] if isinstance(chosen, int) else chosen
        # hidden_states[i] is the state after i layers; negative numbers count from the end.
        highest = max(layer if layer >= 0 else layers + 1 + layer for layer in chosen)
        tower = "model.vision_tower."
        above = tuple(f"{tower}encoder.layers.{i}." for i in range(highest, layers))
        return (*above, f"{tower}post_layernorm.", f"{tower}head.")

    def alone_and_together_differ(self) -> bool:
        return True
