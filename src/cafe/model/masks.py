"""The attention rule of rows (`cafe.model.trie`), as each attention kernel takes it."""

from __future__ import annotations

from typing import Any

import torch

from cafe.model.rows import Rows
from cafe.model.trie import AttentionRule, padding_mask


def attention_masks(rows: Rows, model: Any, windows: dict[str, int | None]) -> Any:
    """One mask, or one for each kind of layer where a model has several kinds.

    rows      on the model's device
    windows   how far each kind of layer sees (`cafe.model.attention.layer_windows`)

    FlashAttention-2 takes only which tokens are padding; windows are its own concern.
    """
    if model.config._attn_implementation == "flash_attention_2":
        return padding_mask(rows.subtree_end)
    length = rows.input_ids.shape[1]
    # A window that holds a whole row is none.
    seen = {k: w if w is not None and w < length else None for k, w in windows.items()}
    masks = {window: mask_of(rows, model, window) for window in set(seen.values())}
    if len(windows) > 1:
        return {kind: masks[window] for kind, window in seen.items()}
    mask = masks[next(iter(seen.values()))]
    # A mask by itself goes through transformers, which takes None for "guess it from positions",
    # and "every token is real" for the causal kernel.
    return torch.ones_like(rows.input_ids, dtype=torch.bool) if mask is None else mask


def mask_of(rows: Rows, model: Any, window: int | None) -> Any:
    """The mask for layers that see `window` tokens; None asks SDPA for its causal kernel."""
    attention = model.config._attn_implementation
    if attention == "sdpa" and rows.plain and rows.sight_end is None and window is None:
        # That kernel skips what a mask would hide. Padding is on the right, where no token looks.
        return None
    rule = AttentionRule(rows.subtree_end, rows.sight_end, rows.depth, window)
    if attention == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        count, length = rows.input_ids.shape
        device = str(rows.input_ids.device)
        return create_block_mask(rule.mask_mod(), count, None, length, length, device=device)
    mask = rule.dense()
    if attention == "eager":
        blocked = torch.finfo(model.dtype).min
        return torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, blocked)
    return mask
