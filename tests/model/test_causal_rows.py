"""Rows of one sequence each need no mask, and rows that branch do."""

from __future__ import annotations

from dataclasses import replace

import torch

from cafe.model.attention import mask_of
from cafe.model.rows.inputs import as_messages
from cafe.model.rows.rows import Rows
from cafe.model.vlm import CAFe
from helpers.mixed_inputs import INPUTS, TEXTS

FREE_ATTENTION = 1e9


def test_rows_of_one_sequence_each_need_no_mask(small_model: CAFe):
    """The causal kernel gives the states and gradients of the dense rule, padding or not."""
    rows, vision = small_model.collator.embedding_rows(as_messages(INPUTS))
    assert rows.plain
    assert mask_of(rows, small_model.model, window=None) is None
    masked = replace(rows, plain=False)
    assert mask_of(masked, small_model.model, window=None) is not None

    def states_and_gradients(read: Rows) -> tuple[torch.Tensor, list[torch.Tensor]]:
        small_model.zero_grad()
        states = small_model(read, vision).flatten(0, 1)[read.pooled]
        states.square().sum().backward()
        gradients = [p.grad.clone() for p in small_model.parameters() if p.grad is not None]
        small_model.zero_grad()
        return states.detach(), gradients

    states, gradients = states_and_gradients(rows)
    expected, expected_gradients = states_and_gradients(masked)
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)


def test_rows_that_branch_keep_their_mask(small_model: CAFe):
    """Under the causal kernel a branch would see the one before it."""
    rows, vision = small_model.collator.embedding_rows(
        as_messages(TEXTS), token_cost=FREE_ATTENTION
    )
    assert not rows.plain
    with torch.inference_mode():
        right = small_model.hidden_at(rows, vision)
        wrong = small_model.hidden_at(replace(rows, plain=True), vision)
    assert (right - wrong).abs().max() > 1e-3, "the mask would not be missed"
