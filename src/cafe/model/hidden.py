"""Rows and images -> hidden states: the forward of `CAFe`, block by block.

The vision tower runs once per distinct image of all rows; the language model once per block of rows
(`cafe.model.rows.blocks`), with the features of the images that the block shows.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from cafe.model.attention import attention_masks, stateful_layers
from cafe.model.families import Family
from cafe.model.families.base import distinct_features, features_in_order
from cafe.model.last_layer import compute_last_layer_at, recomputes_last_layer
from cafe.model.rows.rows import Rows
from cafe.model.rows.segments import Segments

if TYPE_CHECKING:
    from jaxtyping import Float


def hidden_states(
    model: Any,
    family: Family,
    windows: dict[str, int | None],
    rows: Rows,
    vision: dict[str, Tensor],
    *,
    read_only: bool,
) -> Float[Tensor, "rows t hidden"]:
    """Hidden states after the final norm; zero at the padding that no block computes.

    Args:
        model: transformers' `...ForConditionalGeneration`.
        family: the facts of the model.
        windows: how far each kind of layer sees (`cafe.model.attention.layer_windows`).
        rows: on the model's device.
        vision: the vision tower's inputs, on the model's device.
        read_only: as in `CAFe.forward`.
    """
    read_only = read_only and not recomputes_last_layer(model.get_decoder())
    features = distinct_features(family, model, vision)
    states: list[Tensor] = []
    for block in rows.split() if rows.blocks else [rows]:
        indices = block.read, block.input_ids.shape
        with compute_last_layer_at(*indices) if read_only else nullcontext():
            computed = model.model(
                input_ids=block.input_ids,
                attention_mask=attention_masks(block, model, windows, family.bidirectional_layers),
                position_ids=block.positions,
                mm_encoder_outputs=features_of_rows(model, family, features, block),
                use_cache=False,
                **branches(block, model),
            ).last_hidden_state
        missing = rows.input_ids.shape[1] - computed.shape[1]
        states.append(functional.pad(computed, (0, 0, 0, missing)) if missing else computed)
    hidden = torch.cat(states) if len(states) > 1 else states[0]
    used = {number for order in rows.orders for number in order}
    unused = set(range(len(features))) - used
    if unused and torch.is_grad_enabled():
        # Every rank must run the tower's backward, or the others wait for its gradients.
        hidden = hidden + 0 * sum(features[i].sum() for i in unused)
    return hidden


def branches(rows: Rows, model: Any) -> dict[str, Any]:
    """What layers that carry a state need to know of rows that branch (`cafe.model.stateful`).

    Nothing where every row is one sequence: then transformers' own kernels are right.
    """
    if rows.plain or not stateful_layers(model.config):
        return {}
    return {"segments": Segments.of(rows.subtree_end)}


def features_of_rows(
    model: Any, family: Family, features: list[Tensor], rows: Rows
) -> dict[str, Any]:
    """Features of distinct images as transformers' forward and `generate` take them, in row order.

    Args:
        model: transformers' `...ForConditionalGeneration`.
        family: the facts of the model.
        features: one tensor per distinct image.
        rows: the rows that show them.
    """
    width = int(model.config.get_text_config().hidden_size)
    return features_in_order(family, features, rows.orders, width)
