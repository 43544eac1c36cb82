"""LLaVA-OneVision: SigLIP tower, two-layer projector, Qwen2 language model, anyres tiles.

The single image of a prompt gives an overview and tiles; with other images it gives only the
overview (`batch_num_images`), so its features depend on the other images in the prompt. A video's
frames are pooled to a quarter of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from cafe.media import Clip
from cafe.model.families.base import Family, ProcessedImages, in_blocks, one_by_one, tower_above


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
        counts = [len(group) for group in groups]
        # `replace_image_token` iterates over the counts for every image: slow in a tensor.
        inputs["batch_num_images"] = counts
        placeholders = [processor.replace_image_token(inputs, i) for i in range(sum(counts))]
        inputs["batch_num_images"] = torch.tensor(counts)
        return ProcessedImages(inputs=dict(inputs), placeholders=placeholders)

    def video_marker(self, processor: Any) -> str:
        return processor.video_token

    def video_placeholder_id(self, processor: Any) -> int:
        return processor.video_token_id

    def process_videos(self, processor: Any, clips: Sequence[Clip]) -> ProcessedImages:
        frames, placeholders = one_by_one(processor, clips)
        return ProcessedImages(
            inputs={
                "video_frames": frames,
                "video_lengths": torch.tensor([len(clip.frames) for clip in clips]),
            },
            placeholders=placeholders,
        )

    def image_features(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        videos = {"video_frames", "video_lengths"}
        images = {name: tensor for name, tensor in inputs.items() if name not in videos}
        features: list[Tensor] = []
        if images:
            features += _image_features(model, **images)
        if "video_frames" in inputs:
            for frames in inputs["video_frames"].split(inputs["video_lengths"].tolist()):
                features += model.get_video_features(frames[None], return_dict=True).pooler_output
        return features

    def video_output(self, features: Sequence[Tensor], hidden: int) -> Any:
        return in_blocks(features)

    def unused(self, config: Any) -> tuple[str, ...]:
        return tower_above(config, "model.vision_tower.")

    def features_depend_on_image_count(self) -> bool:
        return True


def _image_features(
    model: Any, pixel_values: Tensor, image_sizes: Tensor, batch_num_images: Tensor
) -> list[Tensor]:
    """`get_image_features`, but an image whose only tile equals its overview is computed once.

    A square image that needs only one tile is the same pixels twice. The tower runs exactly once,
    whatever the images are: ranks that share its weights wait for each other there.
    """
    from transformers.models.llava_onevision.modeling_llava_onevision import (
        image_size_to_num_patches,
    )

    config, pixels = model.config, model.config.vision_config.image_size
    single_in_prompt = batch_num_images.repeat_interleave(batch_num_images) == 1
    views = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, pixels) if tiled else 1
        for size, tiled in zip(image_sizes, single_in_prompt.tolist(), strict=True)
    ]
    first, second = pixel_values[:, 0], pixel_values[:, :2][:, -1]
    # transformers crops the padding lines from the tile of an image that is not square: if the
    # image is all one colour, its pixels are equal but its features differ.
    square = image_sizes[:, 0] == image_sizes[:, 1]
    same = (square & (first == second).flatten(1).all(1)).tolist()
    twice = [count == 2 and equal for count, equal in zip(views, same, strict=True)]
    tiled = [i for i, count in enumerate(views) if count > 1 and not twice[i]]
    single = [i for i, count in enumerate(views) if count == 1 or twice[i]]
    order = [*tiled, *single]
    kept = [pixel_values[i, : views[i]] for i in tiled] + [pixel_values[i, :1] for i in single]
    # Images that share a prompt are not tiled; counting one image too many marks them so.
    counts = torch.tensor([1] * len(tiled) + [len(single) + 1])
    computed = model.get_image_features(
        torch.cat(kept), image_sizes[order], batch_num_images=counts, return_dict=True
    ).pooler_output
    side = pixels // config.vision_config.patch_size
    return [
        _with_tile(computed[at], side) if twice[i] else computed[at]
        for i, at in enumerate(sorted(range(len(order)), key=order.__getitem__))
    ]


def _with_tile(features: Tensor, side: int) -> Tensor:
    """The overview (side x side features and a line end), followed by the same as a tile."""
    overview, line_end = features[:-1], features[-1:]
    lines = torch.cat(
        [overview.unflatten(0, (side, side)), line_end.expand(side, 1, -1)], dim=1
    ).flatten(0, 1)
    return torch.cat([overview, lines])
