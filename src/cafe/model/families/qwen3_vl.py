"""Qwen3-VL: Qwen2-VL with DeepStack: features of several tower layers enter the first layers.

An image's features are concatenated to [tokens, (1 + layers) * hidden], beginning with those that
enter as embeddings.

In Qwen3-VL-MoE the MLP of each layer is a mixture of experts, as in Qwen3.5-MoE
(`cafe.model.families.qwen3_5` says what that changes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cafe.media import Clip
from cafe.model.families.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    model_type = "qwen3_vl"
    parts = {  # noqa: RUF012 - facts, never written to
        "vision": ("model.visual.patch_embed.", "model.visual.pos_embed.", "model.visual.blocks."),
        "projector": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
        "language": ("model.language_model.", "lm_head."),
    }

    def time_step(self, processor: Any, clip: Clip) -> float:
        # Every pair of frames is a run of its own, and the text before it says its time.
        return 0.0

    def levels(self, outputs: Any) -> list[Tensor]:
        levels = [outputs.pooler_output, *outputs.deepstack_features]
        return [torch.cat(image, dim=-1) for image in zip(*levels, strict=True)]

    def encoder_output(self, features: Sequence[Tensor], hidden: int) -> Any:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import (
            BaseModelOutputWithDeepstackFeatures,
        )

        levels: list[Any] = list(zip(*(f.split(hidden, dim=-1) for f in features), strict=True))
        deeper: Any = [list(level) for level in levels[1:]]
        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=levels[0], deepstack_features=deeper
        )


class Qwen3VLMoE(Qwen3VL):
    model_type = "qwen3_vl_moe"
