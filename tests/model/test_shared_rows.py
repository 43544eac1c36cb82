"""Inputs that share rows at inference: the values of separate rows, at the least estimated cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.model.rows.inputs import as_messages
from cafe.model.rows.rows import shared_rows
from cafe.model.rows.trie import TokenSequence, build_row
from cafe.model.vlm import CAFe
from helpers.mixed_inputs import INPUTS, SQUARE, TEXTS

FREE_ATTENTION = 1e9
FREE_MATRICES = 0.0


def alone(model: CAFe, rendered: Any) -> torch.Tensor:
    """States of each input in a row and a batch of its own, every layer whole: [n, hidden]."""
    states = []
    with torch.inference_mode():
        for value in INPUTS:
            rows, vision = rendered(as_messages([value]))
            states.append(model(rows, vision).flatten(0, 1)[rows.pooled][0])
    return torch.stack(states)


@pytest.mark.parametrize("kind", ["embedding_rows", "prompt_rows"])
def test_inputs_that_share_a_row_have_the_states_that_they_have_alone(small_model: CAFe, kind: str):
    collate = getattr(small_model.collator, kind)
    slow = alone(small_model, collate)
    conversations = as_messages(INPUTS)
    counts = set()
    for token_cost in (FREE_MATRICES, 30.0, 500.0, FREE_ATTENTION):
        rows, vision = collate(conversations, token_cost=token_cost)
        with torch.inference_mode():
            states = small_model.hidden_at(rows, vision)
        assert (states - slow).abs().max() <= 1e-5
        counts.add(len(rows.input_ids))
    assert min(counts) == 1, "where attention is free, all of them are one row"
    assert max(counts) >= len(INPUTS) // 2, "and where the matrices are, few share one"


def test_rows_are_not_shared_where_attention_cannot(small_model: CAFe):
    separate = replace(small_model.collator, sharing="none")
    rows, _ = separate.embedding_rows(as_messages(TEXTS), token_cost=FREE_ATTENTION)
    assert len(rows.input_ids) == len(TEXTS)


def tokens_of(keys: list[np.ndarray], rows: list[list[int]]) -> list[int]:
    made = [build_row([TokenSequence(keys[i], keys[i]) for i in row]) for row in rows]
    return [len(row) for row in made]


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=8), min_size=1, max_size=12),
    st.sampled_from([0.0, 2.0, 10.0, 1e6]),
)
@settings(deadline=None, max_examples=150)
def test_the_chosen_rows_cost_no_more_than_any_other_cut(sequences: list[list[int]], cost: float):
    keys = [np.array(s, dtype=np.int64) for s in sequences]
    rows = shared_rows(keys, cost)
    assert sorted(i for row in rows for i in row) == list(range(len(keys)))
    assert all(rows)

    def price(cut: list[list[int]]) -> float:
        longest = max(tokens_of(keys, cut))
        return len(cut) * longest * (cost + longest)

    others = [[[i] for i in range(len(keys))], [list(range(len(keys)))]]
    assert price(rows) <= min(map(price, others))


def test_equal_beginnings_are_put_into_one_row():
    keys = [np.array([*begin, i]) for i in range(6) for begin in ([7] * 9, [8] * 9)]
    rows = shared_rows(keys, 40.0)
    assert len(rows) < len(keys)
    assert all(len({keys[i][0] for i in row}) == 1 for row in rows)
    assert shared_rows([], 1.0) == []


def test_texts_about_one_image_are_scored_in_one_row(small_model: CAFe):
    seen: list[torch.Size] = []
    handle = small_model.model.model.language_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["inputs_embeds"].shape), with_kwargs=True
    )
    try:
        together = small_model.score(SQUARE, TEXTS)
    finally:
        handle.remove()
    one = small_model.collator.prompt_rows(as_messages([{"image": SQUARE, "text": TEXTS[0]}]))[0]
    ((rows, tokens, _),) = seen
    assert rows * tokens < 3 * one.input_ids.numel(), "six questions, fewer than three images"
    apart = [float(small_model.score(SQUARE, [text])[0]) for text in TEXTS]
    assert np.abs(together - apart).max() <= 1e-6
    assert np.ptp(together) > 1e-4
