"""Idefics3 and SmolVLM: SigLIP tower over tiles and a whole view, pixel shuffle, one matrix; Llama.

The placeholder text names each tile's row and column. The processor's tensors are
[samples, tiles, ...], padded with empty tiles; here each image is a sample, and only its real
tiles are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch

from cafe.media import Clip
from cafe.model.families.base import ProcessedImages, flat, metadata
from cafe.model.families.tiles import TiledFamily


class Idefics3(TiledFamily):
    model_type = "idefics3"
    parts = {  # noqa: RUF012 - facts, never written to
        "vision": ("model.vision_model.",),
        "projector": ("model.connector.",),
        "language": ("model.text_model.", "lm_head."),
    }

    def process_images(
        self, processor: Any, groups: Sequence[Sequence[PIL.Image.Image]]
    ) -> ProcessedImages:
        images = flat(groups)
        inputs = processor.image_processor(
            [[image] for image in images], return_row_col_info=True, return_tensors="pt"
        )
        placeholders = [processor.replace_image_token(inputs, i) for i in range(len(images))]
        grid = zip(inputs.pop("rows"), inputs.pop("cols"), strict=True)
        # An image that is not split has 0 rows, 0 columns and one view.
        tiles = torch.tensor([rows[0] * columns[0] + 1 for rows, columns in grid])
        real = torch.arange(inputs["pixel_values"].shape[1])[None] < tiles[:, None]
        vision = {name: tensor[real][:, None] for name, tensor in inputs.items()}
        return ProcessedImages(
            inputs={**vision, "feature_counts": self.counts(processor, placeholders)},
            placeholders=placeholders,
        )


class SmolVLM(Idefics3):
    """The same modules, and videos: each frame one view, with its time in the text before it.

    Its processor needs the package `num2words`.
    """

    model_type = "smolvlm"

    def video_marker(self, processor: Any) -> str:
        return processor.video_token

    def process_videos(self, processor: Any, clips: Sequence[Clip]) -> ProcessedImages:
        vision: dict[str, list[torch.Tensor]] = {}
        placeholders = []
        for clip in clips:
            inputs = processor.video_processor(
                [list(clip.frames)],
                do_sample_frames=False,
                video_metadata=[metadata(clip)],
                return_metadata=True,
                return_tensors="pt",
            )
            placeholders.append(processor.replace_video_token(inputs, 0))
            for name in ("pixel_values", "pixel_attention_mask"):
                if name in inputs:
                    vision.setdefault(name, []).append(inputs[name][0][:, None])
        return ProcessedImages(
            inputs={
                **{name: torch.cat(frames) for name, frames in vision.items()},
                "feature_counts": self.counts(processor, placeholders),
            },
            placeholders=placeholders,
        )
