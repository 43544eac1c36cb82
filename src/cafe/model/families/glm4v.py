"""GLM-4.1V and GLM-4.6V: Qwen-VL's grids of patches, downsampled by a convolution, then merged.

Videos have the images' placeholder token. Every pair of frames is a run of it, followed by its time
as text, and counts as an image of its own in the positions. transformers tells images from videos
by the marks of the video around them; cafe passes both as images, in the order of their runs.
Published templates write nothing after an answer: its end is the next role, or the end of text.
"""

from __future__ import annotations

from typing import Any

from cafe.media import Clip
from cafe.model.families.qwen2_vl import Qwen2VL


class Glm4V(Qwen2VL):
    model_type = "glm4v"
    parts = {  # noqa: RUF012 - facts, never written to
        "vision": (
            "model.visual.embeddings.",
            "model.visual.patch_embed.",
            "model.visual.post_conv_layernorm.",
            "model.visual.blocks.",
            "model.visual.post_layernorm.",
        ),
        "projector": ("model.visual.downsample.", "model.visual.merger."),
        "language": ("model.language_model.", "lm_head."),
    }

    def video_placeholder_id(self, processor: Any) -> int:
        return processor.image_token_id

    def time_step(self, processor: Any, clip: Clip) -> float:
        # Every pair of frames is a run of its own, and the text after it says its time.
        return 0.0


class Glm46V(Glm4V):
    """The same modules; the times of a video's frames are written with a decimal place."""

    model_type = "glm46v"
