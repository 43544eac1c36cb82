"""The trie: sequences merged where they begin alike, and who may attend to whom.

The slow twin is the definition: nodes are the distinct prefixes of the sequences, a token's
ancestors are the prefixes of its own prefix.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from cafe.model.image_keys import IMAGE_STRIDE, image_keys, image_of_key
from cafe.model.rows.trie import (
    Row,
    TokenSequence,
    build_row,
    dense_mask,
    mask_mod,
    pack_rows,
    separate_rows,
    stack_rows,
)

PLACEHOLDER = 3
CHECKED = settings(max_examples=60, deadline=None)
Keys = tuple[int, ...]


@st.composite
def sequences(draw: st.DrawFn) -> TokenSequence:
    """Short texts over few tokens (so they share beginnings), with images of one to three
    placeholders among them."""
    keys: list[np.ndarray] = []
    for piece in draw(st.lists(st.integers(-2, 2), min_size=1, max_size=6)):
        # Image -1 has one placeholder, image -2 has three.
        keys.append(np.array([piece]) if piece >= 0 else image_keys(-piece, -2 * piece - 1))
    merged = np.concatenate(keys)
    return TokenSequence(np.where(merged < 0, PLACEHOLDER, merged), merged)


sets = st.lists(sequences(), min_size=1, max_size=6)


def prefixes(sequence: TokenSequence) -> list[Keys]:
    keys = tuple(sequence.keys.tolist())
    return [keys[: i + 1] for i in range(len(keys))]


def nodes_of(row: Row, group: list[TokenSequence]) -> list[Keys]:
    """The prefix that each row index stands for, from where the sequences went."""
    nodes: dict[int, Keys] = {}
    for sequence, places in zip(group, row.token_indices, strict=True):
        for place, prefix in zip(places.tolist(), prefixes(sequence), strict=True):
            assert nodes.setdefault(place, prefix) == prefix
    return [nodes[i] for i in range(len(row))]


def mask_of(row: Row) -> np.ndarray:
    return dense_mask(torch.from_numpy(row.subtree_end)[None])[0, 0].numpy()


def example() -> list[TokenSequence]:
    """a b c | a b d e | a b | f, as the figure of the module has it."""
    return [TokenSequence.from_text(t) for t in ([1, 2, 4], [1, 2, 5, 6], [1, 2], [7])]


def test_a_row_that_a_person_can_check():
    row = build_row(example())
    assert row.tokens.tolist() == [1, 2, 4, 5, 6, 7]
    assert row.positions.tolist() == [0, 1, 2, 2, 3, 0]
    assert row.subtree_end.tolist() == [5, 5, 3, 5, 5, 6]
    assert [p.tolist() for p in row.token_indices] == [[0, 1, 2], [0, 1, 3, 4], [0, 1], [5]]
    assert mask_of(row).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@CHECKED
@given(sets)
def test_places_give_back_every_sequence(group: list[TokenSequence]):
    row = build_row(group)
    for sequence, places in zip(group, row.token_indices, strict=True):
        assert row.tokens[places].tolist() == sequence.tokens.tolist()
        assert row.keys[places].tolist() == sequence.keys.tolist()
        assert row.positions[places].tolist() == list(range(len(sequence.tokens)))


@CHECKED
@given(sets)
def test_a_row_is_minimal_one_token_per_distinct_prefix(group: list[TokenSequence]):
    distinct = {prefix for sequence in group for prefix in prefixes(sequence)}
    row = build_row(group)
    assert len(row) == len(distinct)
    assert set(nodes_of(row, group)) == distinct


@CHECKED
@given(sets)
def test_subtree_end_is_the_index_after_the_last_descendant(group: list[TokenSequence]):
    row = build_row(group)
    nodes = nodes_of(row, group)
    for i, node in enumerate(nodes):
        family = [j for j, other in enumerate(nodes) if other[: len(node)] == node]
        assert family == list(range(i, row.subtree_end[i])), "a subtree is one run of the row"


@CHECKED
@given(sets)
def test_a_token_sees_exactly_the_prefixes_of_its_own_sequence(group: list[TokenSequence]):
    row = build_row(group)
    nodes = nodes_of(row, group)
    ancestors = [[node[: len(other)] == other for other in nodes] for node in nodes]
    assert np.array_equal(mask_of(row), np.array(ancestors))


@CHECKED
@given(sets)
def test_the_mask_of_one_sequence_is_causal_and_complete(group: list[TokenSequence]):
    row = build_row(group)
    mask = mask_of(row)
    for places in row.token_indices:
        own = mask[np.ix_(places, places)]
        assert np.array_equal(own, np.tril(np.ones_like(own)))
        others = np.setdiff1d(np.arange(len(row)), places)
        assert not mask[np.ix_(places, others)].any()


@CHECKED
@given(sets, st.permutations(range(6)))
def test_the_order_of_sequences_changes_no_path(group: list[TokenSequence], order: list[int]):
    order = [i for i in order if i < len(group)]
    row, shuffled = build_row(group), build_row([group[i] for i in order])
    assert len(row) == len(shuffled)
    for new, old in enumerate(order):
        assert row.tokens[row.token_indices[old]].tolist() == (
            shuffled.tokens[shuffled.token_indices[new]].tolist()
        )


def test_equal_sequences_and_prefixes_cost_nothing():
    a = TokenSequence.from_text([1, 2, 3])
    row = build_row([a, a, TokenSequence.from_text([1, 2])])
    assert len(row) == 3
    assert row.token_indices[0].tolist() == row.token_indices[1].tolist() == [0, 1, 2]
    assert row.token_indices[2].tolist() == [0, 1]


def test_two_images_are_never_merged_and_one_always_is():
    def shown(image: int) -> TokenSequence:
        keys = np.concatenate([[1], image_keys(image, 4), [2]])
        return TokenSequence(np.where(keys < 0, PLACEHOLDER, keys), keys)

    assert len(build_row([shown(0), shown(0)])) == 6
    assert len(build_row([shown(0), shown(1)])) == 1 + 5 + 5
    # Their token ids are equal: without keys they would have been merged.
    assert np.array_equal(shown(0).tokens, shown(1).tokens)


@CHECKED
@given(st.integers(0, 2**20), st.integers(1, 5000))
def test_a_key_names_its_image_and_place(image: int, count: int):
    keys = image_keys(image, count)
    assert (keys < 0).all()
    assert [image_of_key(k) for k in keys[[0, -1]]] == [(image, 0), (image, count - 1)]
    assert len(np.unique(np.concatenate([keys, image_keys(image + 1, count)]))) == 2 * count
    assert count < IMAGE_STRIDE


@CHECKED
@given(sets)
def test_separate_rows_are_the_sequences_themselves(group: list[TokenSequence]):
    for row, sequence in zip(separate_rows(group), group, strict=True):
        assert row.keys.tolist() == sequence.keys.tolist()
        assert row.subtree_end.tolist() == [len(row)] * len(row)


@CHECKED
@given(st.lists(sets, min_size=1, max_size=5), st.integers(1, 40))
def test_packed_rows_are_the_rows_one_after_the_other(
    groups: list[list[TokenSequence]], max_tokens: int
):
    rows = [build_row(group) for group in groups]
    packed = pack_rows(rows, max_tokens)
    alone, together = iter(rows), iter(packed)
    begin, row = 0, next(together)
    places = iter([p for r in packed for p in r.token_indices])
    for single in alone:
        if begin == len(row):
            begin, row = 0, next(together)
        end = begin + len(single)
        assert row.tokens[begin:end].tolist() == single.tokens.tolist()
        assert row.positions[begin:end].tolist() == single.positions.tolist()
        mask = mask_of(row)
        assert np.array_equal(mask[begin:end, begin:end], mask_of(single))
        assert not mask[begin:end, :begin].any()
        assert not mask[end:, begin:end].any()
        for place in single.token_indices:
            assert next(places).tolist() == (place + begin).tolist()
        begin = end
    assert next(together, None) is None
    assert all(len(r) <= max_tokens or len(r) in map(len, rows) for r in packed)


def test_packing_fills_rows_in_order_and_leaves_long_ones_alone():
    rows = [build_row([TokenSequence.from_text(range(n))]) for n in (3, 4, 9, 2, 2)]
    assert [len(r) for r in pack_rows(rows, 7)] == [7, 9, 4]


@CHECKED
@given(st.lists(sets, min_size=1, max_size=4))
def test_padding_sees_only_itself_and_is_not_seen(groups: list[list[TokenSequence]]):
    rows = [build_row(group) for group in groups]
    batch = stack_rows(rows, pad_token=9)
    mask = dense_mask(batch.subtree_end)[:, 0].numpy()
    width = max(len(row) for row in rows)
    assert mask.shape == (len(rows), width, width)
    for r, row in enumerate(rows):
        t = len(row)
        assert batch.input_ids[r, :t].tolist() == row.tokens.tolist()
        assert batch.input_ids[r, t:].tolist() == [9] * (width - t)
        assert batch.positions[r, :t].tolist() == row.positions.tolist()
        assert np.array_equal(mask[r, :t, :t], mask_of(row))
        assert np.array_equal(mask[r, t:, t:], np.eye(width - t, dtype=bool))
        assert not mask[r, :t, t:].any()
        assert not mask[r, t:, :t].any()


@CHECKED
@given(st.lists(sets, min_size=1, max_size=3))
def test_the_rule_for_flex_attention_is_the_dense_mask(groups: list[list[TokenSequence]]):
    subtree_end = stack_rows([build_row(group) for group in groups], 0).subtree_end
    count, length = subtree_end.shape
    dense = dense_mask(subtree_end)
    rule = mask_mod(subtree_end)
    row, query, key = torch.meshgrid(
        torch.arange(count), torch.arange(length), torch.arange(length), indexing="ij"
    )
    assert torch.equal(rule(row, torch.tensor(0), query, key), dense[:, 0])
    assert torch.equal(create_mask(rule, count, 1, length, length, device="cpu"), dense)


def test_a_wrong_subtree_end_is_noticed():
    row = build_row(example())
    wrong = row.subtree_end.copy()
    wrong[2] += 1  # the leaf "c" now covers its sibling "d"
    seen = dense_mask(torch.from_numpy(wrong)[None])[0, 0].numpy()
    assert not np.array_equal(seen, mask_of(row))


@pytest.mark.parametrize("group", [[], [TokenSequence.from_text([])]])
def test_an_empty_row_is_refused(group: list[TokenSequence]):
    with pytest.raises(ValueError, match="at least one sequence"):
        build_row(group)
