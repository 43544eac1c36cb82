"""Qwen2-VL and Qwen2.5-VL: a tower for any resolution, a patch merger, M-RoPE positions.

Images keep their shape; 2 x 2 patches become one token, so an image is a grid of tokens, and
the processor's tensors are one long list of patches and a grid per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from torch import Tensor

from cafe.media import Clip
from cafe.model.families.base import Family, Grid, ProcessedImages, flat, metadata, together
from cafe.model.families.mrope import mrope_positions


class Qwen2VL(Family):
    model_type = "qwen2_vl"
    parts = {  # noqa: RUF012 - facts, never written to
        "vision": ("model.visual.patch_embed.", "model.visual.blocks."),
        "projector": ("model.visual.merger.",),
        "language": ("model.language_model.", "lm_head."),
    }

    def process_images(
        self, processor: Any, groups: Sequence[Sequence[PIL.Image.Image]]
    ) -> ProcessedImages:
        images = flat(groups)
        inputs = processor.image_processor(images, return_tensors="pt")
        merge = processor.image_processor.merge_size
        return ProcessedImages(
            inputs=dict(inputs),
            placeholders=[processor.replace_image_token(inputs, i) for i in range(len(images))],
            grids=[
                Grid(frames, height // merge, width // merge)
                for frames, height, width in inputs["image_grid_thw"].tolist()
            ],
        )

    def video_marker(self, processor: Any) -> str:
        return processor.video_token

    def video_placeholder_id(self, processor: Any) -> int:
        return processor.video_token_id

    def process_videos(self, processor: Any, clips: Sequence[Clip]) -> ProcessedImages:
        inputs, placeholders = together(processor, clips)
        merge = processor.video_processor.merge_size
        grids = [
            Grid(frames, height // merge, width // merge, self.time_step(processor, clip))
            for clip, (frames, height, width) in zip(
                clips, inputs["video_grid_thw"].tolist(), strict=True
            )
        ]
        names = ("pixel_values_videos", "video_grid_thw")
        return ProcessedImages({name: inputs[name] for name in names}, placeholders, grids)

    def time_step(self, processor: Any, clip: Clip) -> float:
        """Positions from one pair of frames to the next."""
        return 1.0

    def image_features(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        features: list[Tensor] = []
        if "pixel_values" in inputs:
            features += self.levels(
                model.get_image_features(
                    inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
                )
            )
        if "pixel_values_videos" in inputs:
            features += self.levels(
                model.get_video_features(
                    inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
                )
            )
        return features

    def levels(self, outputs: Any) -> list[Tensor]:
        """The features of each image, from every level that enters the language model."""
        return list(outputs.pooler_output)

    def positions(self, keys: np.ndarray, grids: Sequence[Grid | None]) -> np.ndarray | None:
        return mrope_positions(keys, grids)


class Qwen25VL(Qwen2VL):
    """Positions of a video's frames follow its time, at a configured number per second."""

    model_type = "qwen2_5_vl"

    def __init__(self, tokens_per_second: float = 1.0) -> None:
        self.tokens_per_second = tokens_per_second

    def configured(self, config: Any) -> Qwen25VL:
        return Qwen25VL(config.vision_config.tokens_per_second)

    def time_step(self, processor: Any, clip: Clip) -> float:
        pair = processor.video_processor.temporal_patch_size
        # float32, as in the model.
        seconds = np.float32(pair / metadata(clip).sampled_fps)
        return float(np.float32(self.tokens_per_second) * seconds)
