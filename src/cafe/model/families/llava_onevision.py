"""LLaVA-OneVision: SigLIP tower, two-layer projector, Qwen2 language model, anyres tiles.

A picture alone in its prompt gives an overview and tiles; beside others it gives the overview
only (`batch_num_images`), so its features depend on its company. A video's frames are pooled to a
quarter of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from cafe.media import Clip
from cafe.model.families.base import Family, ProcessedImages, in_blocks, tower_above


class LlavaOnevision(Family):
    model_type = "llava_onevision"
    parts = {  # noqa: RUF012 - facts, never written to
        "vision": ("model.vision_tower.",),
        "projector": ("model.multi_modal_projector.", "model.image_newline"),
        "language": ("model.language_model.", "lm_head."),
    }

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

    def video_marker(self, processor: Any) -> str:
        return processor.video_token

    def video_placeholder_id(self, processor: Any) -> int:
        return processor.video_token_id

    def process_videos(self, processor: Any, clips: Sequence[Clip]) -> ProcessedImages:
        frames, placeholders = [], []
        for clip in clips:
            inputs = processor.video_processor(
                [list(clip.frames)], do_sample_frames=False, return_tensors="pt"
            )
            frames.append(inputs["pixel_values_videos"][0])
            placeholders.append(processor.replace_video_token(inputs, 0))
        return ProcessedImages(
            inputs={
                "video_frames": torch.cat(frames),
                "video_lengths": torch.tensor([len(clip.frames) for clip in clips]),
            },
            placeholders=placeholders,
        )

    def image_features(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        videos = {"video_frames", "video_lengths"}
        pictures = {name: tensor for name, tensor in inputs.items() if name not in videos}
        features: list[Tensor] = []
        if pictures:
            features += model.get_image_features(**pictures, return_dict=True).pooler_output
        if "video_frames" in inputs:
            for frames in inputs["video_frames"].split(inputs["video_lengths"].tolist()):
                features += model.get_video_features(frames[None], return_dict=True).pooler_output
        return features

    def video_output(self, features: Sequence[Tensor], hidden: int) -> Any:
        return in_blocks(features)

    def unused(self, config: Any) -> tuple[str, ...]:
        return tower_above(config, "model.vision_tower.")

    def alone_and_together_differ(self) -> bool:
        return True
