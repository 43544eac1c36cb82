"""Gemma 4: a tower for any resolution, pooled 3 x 3, and a language model with windows.

What the published models have in different combinations needs no fact here: embeddings of a token
for each layer (images have those of padding), keys and values that the last layers take from
earlier ones, keys that are values too, and an MLP beside a mixture of experts. In the larger models
(`use_bidirectional_attention: vision`) the tokens of one image, or of one frame of a video, see
each other, but only in layers with a window; in E2B and E4B they do not.

Of the mixture of experts: no token is dropped, so a token's state does not depend on the other
sequences of its row; it has no auxiliary loss. The experts of a layer are parameters of three
dimensions, which no adapter reaches; the router is a linear layer, and an adapter of all linear
layers adapts it. Its audio is not read here: the audio tower stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import PIL.Image
from torch import Tensor

from cafe.media import Clip
from cafe.model.families.base import Family, ProcessedImages, flat, together


class Gemma4(Family):
    model_type = "gemma4"
    parts = {  # noqa: RUF012 - facts, never written to
        "vision": ("model.vision_tower.", "model.audio_tower.", "model.embed_audio."),
        "projector": ("model.embed_vision.",),
        "language": ("model.language_model.", "lm_head."),
    }
    bidirectional_layers = ("sliding_attention",)
    token_types = "mm_token_type_ids"

    def __init__(self, *, bidirectional: bool = False) -> None:
        self.bidirectional_image_attention = bidirectional

    def configured(self, config: Any) -> Gemma4:
        sight = config.get_text_config().use_bidirectional_attention
        return Gemma4(bidirectional=sight == "vision")

    def process_images(
        self, processor: Any, groups: Sequence[Sequence[PIL.Image.Image]]
    ) -> ProcessedImages:
        images = flat(groups)
        inputs = processor.image_processor(images, return_tensors="pt")
        placeholders = [processor.replace_image_token(inputs, i) for i in range(len(images))]
        names = ("pixel_values", "image_position_ids")
        return ProcessedImages({name: inputs[name] for name in names}, placeholders)

    def video_marker(self, processor: Any) -> str:
        return processor.video_token

    def video_placeholder_id(self, processor: Any) -> int:
        return processor.video_token_id

    def process_videos(self, processor: Any, clips: Sequence[Clip]) -> ProcessedImages:
        """Each frame is a run of its own, with its time in the text before it."""
        inputs, placeholders = together(processor, clips)
        names = ("pixel_values_videos", "video_position_ids", "num_frames_per_video")
        return ProcessedImages({name: inputs[name] for name in names}, placeholders)

    def image_features(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        videos = {"pixel_values_videos", "video_position_ids", "num_frames_per_video"} & {*inputs}
        images = {name: tensor for name, tensor in inputs.items() if name not in videos}
        features: list[Tensor] = []
        if images:
            features += model.get_image_features(**images, return_dict=True).pooler_output
        if videos:
            features += model.get_video_features(
                **{name: inputs[name] for name in videos}, return_dict=True
            ).pooler_output
        return features

    def unused(self, config: Any) -> tuple[str, ...]:
        return ("model.audio_tower.", "model.embed_audio.")
