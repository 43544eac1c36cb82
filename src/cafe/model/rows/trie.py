"""Sequences that begin alike become one row: the token trie (a prefix tree).

The literature calls this *prefix sharing* with *tree attention*; several unrelated sequences or
tries in one row are *sequence packing*.

An example's sequences (query embedding, target embedding, answers) are merged where they begin
alike and flattened depth-first:

    [system, user, <image> x N] ─┬─ "Compress this image in one word:" … [EMB]
                                 └─ "What is on the table?" … "A red mug."

Each token of the row carries its *position* (its depth in the trie) and its *subtree_end* (the
index just after its last descendant). Then

    token i may attend to token j   ⇔   j <= i  and  i < subtree_end[j]

That one integer per token is the whole attention rule: causal, branching, and the packing of
unrelated sequences alike. Every hidden state in the row equals the one its sequence would have
in a row of its own, because a causal model's state depends on the sequence's own prefix only.

Two families of models bend the rule, and the trie bends with them:

- Where the tokens of one image see each other in both directions (Gemma3), each token carries
  its *visible_until* too, the end of its own run of placeholders, and `j < visible_until[i]` takes
  the place of `j <= i`. A run is never split between branches, so the states stay the same.
- A sliding-window layer measures distance in depth, not in row indices, which branches stretch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Bool, Int


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One sequence, before merging.

    tokens  int64 [t]
    keys    int64 [t]; two tokens are the same token exactly if their keys are equal. Text tokens
            are their own keys; image placeholders all share one token id, so their keys name
            the image and the feature (`cafe.model.image_keys`).
    positions   int64 [axes, t], depth first, where the model counts along several axes (M-RoPE);
            None: only the depth. They must depend on the keys up to the token only.
    """

    tokens: np.ndarray
    keys: np.ndarray
    positions: np.ndarray | None = None

    @classmethod
    def from_text(cls, tokens: Sequence[int] | np.ndarray) -> TokenSequence:
        array = np.asarray(tokens, dtype=np.int64)
        return cls(array, array)


@dataclass(frozen=True, slots=True)
class Row:
    """A flattened trie, or several of them one after the other.

    tokens, keys, subtree_end   int64 [t]
    positions   int64 [t], or [axes, t] with the depth first
    token_indices   for each sequence, in input order, the row index of each of its tokens
    """

    tokens: np.ndarray
    keys: np.ndarray
    positions: np.ndarray
    subtree_end: np.ndarray
    token_indices: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.tokens)


def build_row(sequences: Sequence[TokenSequence]) -> Row:
    """Merge `sequences` where they begin alike and flatten the trie depth-first.

    Branches keep the order in which they first appear. A sequence may be a prefix of another,
    or equal to it.

    Raises:
        ValueError: no sequences, an empty one, or sequences that begin alike but count their
            positions differently.
    """
    if not sequences or any(len(sequence.keys) == 0 for sequence in sequences):
        raise ValueError("a row needs at least one sequence, and no empty ones")
    keys = [sequence.keys for sequence in sequences]
    token_indices = [np.empty(len(k), dtype=np.int64) for k in keys]
    runs: list[tuple[int, int, int]] = []  # (sequence, first, last + 1) in row order
    ends: list[int] = []  # subtree_end of each run
    length = 0

    def visit(members: list[int], depth: int) -> None:
        nonlocal length
        shared = _shared_length([keys[m] for m in members], depth)
        run = len(runs)
        if shared > depth:
            _check_positions([sequences[m] for m in members], depth, shared)
            runs.append((members[0], depth, shared))
            ends.append(0)
            row_indices = np.arange(length, length + shared - depth)
            for member in members:
                token_indices[member][depth:shared] = row_indices
            length += shared - depth
        branches: dict[int, list[int]] = {}
        for member in members:
            if len(keys[member]) > shared:
                branches.setdefault(int(keys[member][shared]), []).append(member)
        for branch in branches.values():
            visit(branch, shared)
        if shared > depth:
            ends[run] = length

    visit(list(range(len(sequences))), 0)
    return Row(
        tokens=np.concatenate([sequences[s].tokens[a:b] for s, a, b in runs]),
        keys=np.concatenate([keys[s][a:b] for s, a, b in runs]),
        positions=np.concatenate([_positions(sequences[s], a, b) for s, a, b in runs], axis=-1),
        subtree_end=np.repeat(ends, [b - a for _, a, b in runs]),
        token_indices=tuple(token_indices),
    )


def _shared_length(keys: list[np.ndarray], depth: int) -> int:
    """Length of the common beginning of all `keys`, which are known to share `depth` keys."""
    first = keys[0]
    shared = min(len(k) for k in keys)
    for other in keys[1:]:
        differs = first[depth:shared] != other[depth:shared]
        if differs.any():
            shared = depth + int(differs.argmax())
    return shared


def _positions(sequence: TokenSequence, begin: int, end: int) -> np.ndarray:
    if sequence.positions is None:
        return np.arange(begin, end)
    return sequence.positions[:, begin:end]


def _check_positions(sequences: Sequence[TokenSequence], begin: int, end: int) -> None:
    first = _positions(sequences[0], begin, end)
    for other in sequences[1:]:
        if not np.array_equal(first, _positions(other, begin, end)):
            raise ValueError(
                "equal tokens have unequal positions: such sequences cannot share a row"
            )


def separate_rows(sequences: Sequence[TokenSequence]) -> list[Row]:
    """Each sequence as a row of its own (`sharing: none`): the reference for `build_row`."""
    return [build_row([sequence]) for sequence in sequences]


def pack_rows(rows: Sequence[Row], max_tokens: int) -> list[Row]:
    """Concatenate rows while they fit in `max_tokens` (sequence packing); order is kept.

    A packed row is a forest: no tree attends to another, because its subtrees end before the next
    tree begins. A row longer than `max_tokens` is not packed.
    """
    begin, packed = 0, []
    for count in _packs([len(row) for row in rows], max_tokens):
        packed.append(_concatenate(rows[begin : begin + count]))
        begin += count
    return packed


def _packs(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """How many of the rows, in order, share each packed row."""
    counts: list[int] = []
    used = 0
    for length in lengths:
        if counts and used + length <= max_tokens:
            counts[-1] += 1
            used += length
        else:
            counts.append(1)
            used = length
    return counts


def padded_tokens(lengths: Sequence[int], max_packed: int | None) -> int:
    """Number of tokens of rows of these lengths once they are stacked, padding included.

    Args:
        lengths: Of the rows, in order.
        max_packed: `max_tokens` of `pack_rows`; None: rows are not packed.
    """
    if not lengths:
        return 0
    counts = [1] * len(lengths) if max_packed is None else _packs(lengths, max_packed)
    begins = np.cumsum([0, *counts[:-1]])
    return len(counts) * int(np.add.reduceat(lengths, begins).max())


def _concatenate(rows: Sequence[Row]) -> Row:
    if len(rows) == 1:
        return rows[0]
    offsets = np.cumsum([0, *(len(row) for row in rows[:-1])])
    return Row(
        tokens=np.concatenate([row.tokens for row in rows]),
        keys=np.concatenate([row.keys for row in rows]),
        positions=np.concatenate([row.positions for row in rows], axis=-1),
        subtree_end=np.concatenate(
            [row.subtree_end + o for row, o in zip(rows, offsets, strict=True)]
        ),
        token_indices=tuple(
            indices + o
            for row, o in zip(rows, offsets, strict=True)
            for indices in row.token_indices
        ),
    )


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows padded on the right to one length.

    input_ids, subtree_end   int64 [rows, t]
    positions                int64 [rows, t], or [axes, rows, t] with the depth first
    keys                     int64 [rows, t] (numpy: collation only)
    A padding token sees only itself, and no other token sees it.
    """

    input_ids: Tensor
    positions: Tensor
    subtree_end: Tensor
    keys: np.ndarray


def stack_rows(rows: Sequence[Row], pad_token: int) -> RowBatch:
    """Pad `rows` to the longest and stack them."""
    shape = (len(rows), max(len(row) for row in rows))
    input_ids = np.full(shape, pad_token, dtype=np.int64)
    positions = np.zeros((*rows[0].positions.shape[:-1], *shape), dtype=np.int64)
    subtree_end = np.broadcast_to(np.arange(1, shape[1] + 1), shape).copy()
    keys = np.zeros(shape, dtype=np.int64)
    for r, row in enumerate(rows):
        t = len(row)
        input_ids[r, :t] = row.tokens
        positions[..., r, :t] = row.positions
        subtree_end[r, :t] = row.subtree_end
        keys[r, :t] = row.keys
    return RowBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(positions),
        torch.from_numpy(subtree_end),
        keys,
    )


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """Which token may attend to which, for one kind of layer.

    subtree_end   int64 [rows, t]
    visible_until int64 [rows, t]; None: no token looks ahead
    depth         int64 [rows, t]; needed with a window
    window        a token sees this many tokens of its sequence, itself included; None: all
    """

    subtree_end: Tensor
    visible_until: Tensor | None = None
    depth: Tensor | None = None
    window: int | None = None

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The rule as FlexAttention's `create_block_mask` takes it: (row, head, query, key)."""
        # A closure over tensors, not a method: that is what torch.compile traces best.
        subtree_end, visible_until, depth = self.subtree_end, self.visible_until, self.depth
        window = self.window

        def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            end = query + 1 if visible_until is None else visible_until[row, query]
            allowed = (key < end) & (query < subtree_end[row, key])
            if window is not None and depth is not None:
                allowed = allowed & (depth[row, query] - depth[row, key] < window)
            return allowed

        return rule

    def dense(self) -> Bool[Tensor, "rows 1 t t"]:
        """The rule for SDPA: True where query i may attend to key j."""
        rows, length = self.subtree_end.shape
        index = torch.arange(length, device=self.subtree_end.device)
        row = torch.arange(rows, device=self.subtree_end.device)[:, None, None]
        allowed = self.mask_mod()(row, row, index[None, :, None], index[None, None, :])
        return allowed.expand(rows, length, length)[:, None]


def dense_mask(subtree_end: Int[Tensor, "rows t"]) -> Bool[Tensor, "rows 1 t t"]:
    """The plain rule as a boolean mask."""
    return AttentionRule(subtree_end).dense()


def mask_mod(
    subtree_end: Int[Tensor, "rows t"],
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The plain rule for FlexAttention."""
    return AttentionRule(subtree_end).mask_mod()


def padding_mask(subtree_end: Int[Tensor, "rows t"]) -> Int[Tensor, "rows t"]:
    """1 for real tokens, 0 for padding, where every row is one sequence (`separate_rows`).

    Raises:
        ValueError: a row that branches, or holds several sequences.
    """
    real = torch.arange(subtree_end.shape[1], device=subtree_end.device) < subtree_end[:, :1]
    if bool((real & (subtree_end != subtree_end[:, :1])).any()):
        raise ValueError("a row with branches has no padding mask; collate with sharing none")
    return real.long()
