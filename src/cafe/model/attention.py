"""A model's attention: how far its layers see, the masks of rows, and the kernel for generation.

The rule itself is `cafe.model.rows.trie.AttentionRule`; here it takes the form that each attention
kernel needs.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any, Literal

import torch

from cafe.errors import FamilyError
from cafe.model.families import Family
from cafe.model.rows.rows import Rows
from cafe.model.rows.trie import AttentionRule, padding_mask
from cafe.model.stateful import STATEFUL

OWN_FLEX = "cafe_flex"
"""FlexAttention under a name of ours, for models whose classes say that they do not support it
(Qwen-VL, GLM-V): their language models call whatever function their configuration names. The name
must not contain transformers' own, which such a class refuses."""

FLEX = ("flex_attention", OWN_FLEX)


def register_flex() -> str:
    """Register FlexAttention as `OWN_FLEX` with transformers, and return that name."""
    from transformers import AttentionInterface
    from transformers.integrations.flex_attention import flex_attention_forward

    AttentionInterface.register(OWN_FLEX, flex_attention_forward)
    return OWN_FLEX


def layer_windows(config: Any) -> dict[str, int | None]:
    """How far each kind of attention layer of the language model sees; None: to the beginning.

    In tokens. Layers that carry a state (`cafe.model.stateful`) see nothing, and are not in it.

    Raises:
        FamilyError: a kind of layer that is neither attention, full or in a sliding window, nor
            one whose state can follow branches.
    """
    text = config.get_text_config()
    # "vision" concerns the tokens of images (`Family.bidirectional_image_attention`).
    if getattr(text, "use_bidirectional_attention", False) not in (False, None, "vision"):
        raise FamilyError(
            f"model type {config.model_type!r} with use_bidirectional_attention cannot generate"
        )
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return {"every": window}
    known = {"full_attention": None, "sliding_attention": window}
    for kind in kinds:
        if kind not in (*known, *STATEFUL):
            raise FamilyError(
                f"model type {config.model_type!r}: its {kind!r} layers cannot share a row; "
                f"cafe supports {', '.join((*known, *STATEFUL))}"
            )
    return {kind: known[kind] for kind in sorted(set(kinds) - set(STATEFUL))}


def stateful_layers(config: Any) -> set[str]:
    """The kinds of layers of the language model that carry a state along the sequence."""
    return set(STATEFUL) & set(getattr(config.get_text_config(), "layer_types", None) or ())


def row_sharing(config: Any, family: Family) -> Literal["trie", "none"]:
    """Whether rows may branch: FlashAttention-2 has no mask for them.

    Raises:
        FamilyError: the model's attention cannot follow the rule of its family.
    """
    if config._attn_implementation != "flash_attention_2":
        return "trie"
    if family.bidirectional_image_attention:
        raise FamilyError(
            f"model type {family.model_type!r}: the tokens of an image see each other, which "
            "flash_attention_2 cannot do; use sdpa or flex_attention"
        )
    return "none"


def attention_masks(
    rows: Rows, model: Any, windows: dict[str, int | None], looking_ahead: tuple[str, ...] | None
) -> Any:
    """One mask, or one for each kind of layer where a model has several kinds.

    FlashAttention-2 takes only a padding mask; it applies windows itself.

    Args:
        rows: on the model's device.
        model: the transformers model; its configuration names the kernel.
        windows: how far each kind of layer sees (`layer_windows`).
        looking_ahead: the kinds in which `rows.visible_until` counts; None: all
            (`Family.bidirectional_layers`).
    """
    if model.config._attn_implementation == "flash_attention_2":
        return padding_mask(rows.subtree_end)
    length = rows.input_ids.shape[1]
    # A window as long as a whole row hides nothing.
    effective = {k: w if w is not None and w < length else None for k, w in windows.items()}
    causal = replace(rows, visible_until=None)
    masks: dict[tuple[int | None, bool], Any] = {}
    by_kind = {}
    for kind, window in effective.items():
        ahead = looking_ahead is None or kind in looking_ahead
        if (window, ahead) not in masks:
            masks[window, ahead] = mask_of(rows if ahead else causal, model, window)
        by_kind[kind] = masks[window, ahead]
    if stateful := stateful_layers(model.config):
        # Padding is on the right, and branches are kept apart by `segments`.
        return {**by_kind, **dict.fromkeys(stateful)}
    if len(windows) > 1:
        return by_kind
    mask = next(iter(by_kind.values()))
    # transformers would take None for "guess the mask from positions", and takes "every token is
    # real" for the causal kernel.
    return torch.ones_like(rows.input_ids, dtype=torch.bool) if mask is None else mask


def mask_of(rows: Rows, model: Any, window: int | None) -> Any:
    """The mask for layers that see `window` tokens; None selects SDPA's causal kernel."""
    attention = model.config._attn_implementation
    if attention == "sdpa" and rows.plain and rows.visible_until is None and window is None:
        # That kernel skips what a mask would hide. Padding is on the right, where no token looks.
        return None
    rule = AttentionRule(rows.subtree_end, rows.visible_until, rows.depth, window)
    if attention in FLEX:
        from torch.nn.attention.flex_attention import create_block_mask

        count, length = rows.input_ids.shape
        device = str(rows.input_ids.device)
        return create_block_mask(rule.mask_mod(), count, None, length, length, device=device)
    mask = rule.dense()
    if attention == "eager":
        blocked = torch.finfo(model.dtype).min
        return torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, blocked)
    return mask


class SdpaWhileGenerating:
    """A context in which a model that is set to FlexAttention uses SDPA.

    transformers' `generate` gives FlexAttention one token at a time, for which it is compiled
    again, and which it cannot do on a CPU at all; SDPA gives the same values. Several threads may
    generate in turns: the last one to leave restores FlexAttention.
    Inputs that are embedded in the meantime get SDPA's mask, because masks follow the
    configuration.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._inside = 0
        self._flex: str | None = None

    def __enter__(self) -> None:
        with _LOCK:
            if self._inside == 0 and self._config._attn_implementation in FLEX:
                self._flex = self._config._attn_implementation
                self._set("sdpa")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with _LOCK:
            self._inside -= 1
            if self._inside == 0 and self._flex is not None:
                self._set(self._flex)
                self._flex = None

    def _set(self, attention: str) -> None:
        """For the language model; the vision tower keeps its own kernel."""
        self._config._attn_implementation = {"": attention, "text_config": attention}


_LOCK = threading.Lock()
"""One for all models: a model with a lock of its own could not be copied."""
