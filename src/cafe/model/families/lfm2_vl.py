"""LFM2-VL and LFM3-VL: language models most of whose layers are short convolutions.

A convolution of 3 tokens (LFM2) or 7 (LFM3) carries the last inputs of its sequence as a state;
`cafe.model.stateful` lets it follow branches. The other layers are attention, in LFM3 some of
them in a sliding window. The vision towers have nothing in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from torch import Tensor

from cafe.media import Clip
from cafe.model.families.base import Family, Grid, ProcessedImages, flat, not_thinner
from cafe.model.families.qwen2_vl import Qwen2VL
from cafe.model.families.tiles import TiledFamily

_PARTS = {
    "vision": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
    "language": ("model.language_model.", "lm_head."),
}


class Lfm2VL(TiledFamily):
    """SigLIP 2 over one view of any shape, or over tiles and a thumbnail, named in the text."""

    model_type = "lfm2_vl"
    parts = _PARTS

    def process_images(
        self, processor: Any, groups: Sequence[Sequence[PIL.Image.Image]]
    ) -> ProcessedImages:
        most = processor.image_processor.max_image_tokens  # one line of them is the thinnest view
        images = [not_thinner(image, most) for image in flat(groups)]
        inputs = processor.image_processor(
            [[image] for image in images], return_row_col_info=True, return_tensors="pt"
        )
        placeholders = [
            processor.replace_image_token(
                inputs, i, use_image_special_tokens=processor.use_image_special_tokens
            )
            for i in range(len(images))
        ]
        names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
        return ProcessedImages(
            inputs={
                **{name: inputs[name] for name in names},
                "feature_counts": self.counts(processor, placeholders),
            },
            placeholders=placeholders,
        )

    def encoder_output(self, features: Sequence[Tensor], hidden: int) -> Any:
        return Family.encoder_output(self, features, hidden)

    def unused(self, config: Any) -> tuple[str, ...]:
        return ("model.vision_tower.head.",)


class Lfm3VL(Qwen2VL):
    """Qwen-VL's processing of images and videos, with a tower of its own, and plain positions.

    In the tower, too, most layers are convolutions, over the patches of one frame.
    """

    model_type = "lfm3_vl"
    parts = _PARTS

    def time_step(self, processor: Any, clip: Clip) -> float:
        # Every pair of frames is a run of its own, and the text before it says its time.
        return 0.0

    def positions(self, keys: np.ndarray, grids: Sequence[Grid | None]) -> None:
        return None
