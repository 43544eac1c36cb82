"""Rows of similar length are computed in blocks: less padding, the same states."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cafe.model.rows.blocks import length_blocks
from cafe.model.vlm import CAFe
from cafe.types import Example, Image, Message, user
from helpers import builders
from helpers.marks import slow
from helpers.models import in_float64


def cost(lengths: list[int], sizes: list[int], block_cost: int) -> int:
    """Tokens with padding, and the price of the blocks."""
    ends = itertools.accumulate(sizes)
    return sum(s * lengths[e - 1] + block_cost for s, e in zip(sizes, ends, strict=True))


@pytest.mark.parametrize(
    ("block_cost", "sizes"),
    [
        (0, [1, 2, 1]),  # no padding at all
        (5, [3, 1]),  # 10 and 12 are near enough
        (300, [4]),  # 4 x 100 + 300 is less than 3 x 12 + 100 + 600
    ],
)
def test_a_block_ends_where_that_saves_more_than_it_costs(block_cost: int, sizes: list[int]):
    assert length_blocks([10, 12, 12, 100], block_cost) == sizes


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(0, 40))
def test_no_other_cut_costs_less(lengths: list[int], block_cost: int):
    lengths = sorted(lengths)
    found = length_blocks(lengths, block_cost)
    assert sum(found) == len(lengths)
    cuts = itertools.product([False, True], repeat=len(lengths) - 1)
    every = []
    for cut in cuts:
        ends = [i + 1 for i, here in enumerate(cut) if here] + [len(lengths)]
        every.append([b - a for a, b in itertools.pairwise([0, *ends])])
    least = min(cost(lengths, sizes, block_cost) for sizes in every)
    assert cost(lengths, found, block_cost) == least


def test_many_rows_are_cut_at_some_places_only():
    assert length_blocks([7] * 5000 + [90] * 5000, 10) == [5000, 5000]


def mixed_examples() -> list[Example]:
    """Pairs and answers with no, one and two images, of lengths that rise and fall."""
    rng = np.random.default_rng(0)
    images = [
        Image(PIL.Image.fromarray(rng.integers(0, 255, (40, 48 + 8 * (i % 2), 3), dtype=np.uint8)))
        for i in range(6)
    ]
    words = "a big red cat at the top left"
    asked = [
        (images[0], "What is it?"),
        ("Is it a cat?",),
        (images[1], images[2], "What is on both?"),
        (images[3],),
    ]
    return [
        Example(
            id=str(i),
            query=user(*parts),
            target=user(f"{words} " * (3 - i) + str(i)),
            dialogues=((Message("user", parts), Message("assistant", (f"{words} {i}",))),),
        )
        for i, parts in enumerate(asked)
    ]


@pytest.mark.parametrize("name", [builders.NAMES[0], *slow(*builders.NAMES[1:])])
def test_a_family_has_the_states_and_gradients_of_one_block(name: str, tmp_path: Path):
    model = in_float64(CAFe.from_pretrained(builders.build(name, tmp_path)))
    found = []
    for block_cost in (None, 0):
        collator = dataclasses.replace(model.collator, block_cost=block_cost)
        chunk = collator(mixed_examples())
        states = model(chunk.rows, chunk.vision, read_only=block_cost is not None).flatten(0, 1)
        read = states[torch.cat([chunk.rows.pooled, chunk.rows.label_source])]
        (
            read * torch.linspace(-1, 1, read.numel(), dtype=read.dtype).view_as(read)
        ).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((chunk.rows, read.detach(), gradients))
        model.zero_grad()
    (whole, expected, gradients), (rows, states, others) = found
    assert len(rows.blocks) > 1
    assert not whole.blocks
    assert rows.computed_tokens == rows.tokens < whole.computed_tokens
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-9)
    assert gradients.keys() == others.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(others[key], gradient, rtol=1e-6, atol=1e-8, msg=key)
    assert (expected[0] - expected[1]).abs().max() > 1e-3, "all states are equal"
