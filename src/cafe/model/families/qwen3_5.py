"""Qwen3.5 (and 3.6): Qwen3-VL's images without DeepStack, and a language model of two kinds.

Three layers of four are gated delta-rule layers, which carry a state instead of keys and values;
`cafe.model.stateful` lets them follow branches. In Qwen3.5-MoE the MLP of each layer is a mixture
of experts: every token is computed by the experts that its router chooses, none is dropped, so a
token's state does not depend on the other sequences of its row. The router's auxiliary loss is
transformers' `output_router_logits`, which cafe leaves off. The experts of a layer are parameters
of three dimensions and its router is one of two; neither is a linear layer. So an adapter reaches
the attention, and the MLPs that every token passes, but no expert. Full training reaches all.
"""

from __future__ import annotations

from typing import Any

from cafe.media import Clip
from cafe.model.families.qwen2_vl import Qwen2VL


class Qwen35(Qwen2VL):
    model_type = "qwen3_5"
    parts = {  # noqa: RUF012 - facts, never written to
        "vision": ("model.visual.patch_embed.", "model.visual.pos_embed.", "model.visual.blocks."),
        "projector": ("model.visual.merger.",),
        "language": ("model.language_model.", "lm_head."),
    }

    def time_step(self, processor: Any, clip: Clip) -> float:
        # Every pair of frames is a run of its own, and the text before it says its time.
        return 0.0


class Qwen35MoE(Qwen35):
    model_type = "qwen3_5_moe"
