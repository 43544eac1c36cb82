"""Tokenized sequences -> the rows that the model computes, and the indices that are read of them.

The last step of collation: nothing here knows templates, tokenizers or images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from cafe.model.image_keys import MediaOrders, visible_until
from cafe.model.rows.blocks import blocks_of
from cafe.model.rows.rows import Rows
from cafe.model.rows.trie import Row, TokenSequence, build_row, pack_rows, separate_rows, stack_rows

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Int

    from cafe.model.rows.render import RenderedSequence

Orders = Callable[[np.ndarray], MediaOrders]
"""Keys of rows -> what their runs of placeholders stand for, in order."""

SequenceRole = Literal[
    "query", "target", "negative", "query_thought", "target_thought", "answer", "question"
]


EMBEDDED: tuple[SequenceRole, ...] = (
    "query",
    "target",
    "negative",
    "query_thought",
    "target_thought",
)
"""What an embedding is read from, in the order of `Rows.pooled`."""

WITH_THOUGHT: tuple[SequenceRole, ...] = ("query_thought", "target_thought")


@dataclass(frozen=True, slots=True)
class ReadSequence:
    """A sequence, and which of its tokens are learned from.

    role      its part in the example; None outside training. "question": a match question, whose
              answer is read at its last token
    label_at  indices of the labelled tokens
    """

    tokens: TokenSequence
    role: SequenceRole | None = None
    label_at: Int[np.ndarray, " l"] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass(slots=True, eq=False)
class DraftSequence:
    """A sequence under construction: rendered first; tokens follow once images are counted.

    role, label_at     as in `ReadSequence`
    labelled_answers   how many answers have a labelled token other than control tokens
    """

    name: str
    rendered: RenderedSequence
    role: SequenceRole | None = None
    tokens: TokenSequence = field(default_factory=lambda: TokenSequence.from_text([]))
    label_at: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    labelled_answers: int = 0

    def read(self) -> ReadSequence:
        return ReadSequence(self.tokens, self.role, self.label_at)


@dataclass(frozen=True, slots=True)
class RowLayout:
    """How sequences become rows; the fields are those of `cafe.model.rows.collate.Collator`.

    looks_ahead   the tokens of an image see each other
    every_token   every token of what is embedded is read (`Rows.token_vectors_at`)
    """

    pad_id: int
    sharing: Literal["trie", "none"]
    row_tokens: int | None
    block_cost: int | None
    looks_ahead: bool
    averages: int = 0
    every_token: bool = False

    def merged(self, group: Sequence[TokenSequence]) -> list[Row]:
        """The rows of a group: one, or one for each sequence."""
        if not group:
            return []
        return [build_row(group)] if self.sharing == "trie" else separate_rows(group)

    def rows(
        self, groups: Sequence[Sequence[ReadSequence]], pooled: Sequence[int], orders: Orders
    ) -> Rows:
        """The sequences of a group share their common beginning, unless `sharing` is "none".

        Args:
            groups: the sequences of each example.
            pooled: the sequences whose last token is `Rows.pooled`, in that order: indices into the
                concatenated groups.
            orders: of the chunk's images.
        """
        sequences = [s for group in groups for s in group]
        if not sequences:
            return Rows.none()
        rows = [row for group in groups for row in self.merged([s.tokens for s in group])]
        if self.row_tokens is not None:
            rows = pack_rows(rows, self.row_tokens)
        # Rows are in the order of sequences, and are stacked in the order of their lengths.
        lengths = [len(row) for row in rows]
        sorts = self.block_cost is not None
        order = np.argsort(lengths, kind="stable") if sorts else np.arange(len(rows))
        batch = stack_rows([rows[i] for i in order], self.pad_id)
        flat = _token_indices(rows, order, batch.input_ids.shape[1])
        labelled = [(at, s) for at, s in zip(flat, sequences, strict=True) if len(s.label_at)]
        image_order, video_order, audio_order = orders(batch.keys)
        pooled_at = np.array([flat[i][-1] for i in pooled], dtype=np.int64)
        before = np.arange(-1 - self.averages, -1)  # the latent tokens stand before the last one
        averaged_at = np.array([flat[i][before] for i in pooled], dtype=np.int64)
        averaged_at = averaged_at.reshape(len(pooled), self.averages)
        asked = [at[-1] for at, s in zip(flat, sequences, strict=True) if s.role == "question"]
        asked_at = np.array(asked, dtype=np.int64)
        label_source = concatenated([at[s.label_at - 1] for at, s in labelled])
        label_ids = concatenated([s.tokens.tokens[s.label_at] for _, s in labelled])
        whole = [flat[i] for i in pooled if sequences[i].role not in WITH_THOUGHT]
        embedded = whole if self.every_token else []
        token_vectors_at = concatenated(embedded)
        parts = [pooled_at, averaged_at.ravel(), label_source, asked_at, token_vectors_at]
        read = np.unique(np.concatenate(parts))
        return Rows(
            input_ids=batch.input_ids,
            positions=batch.positions,
            subtree_end=batch.subtree_end,
            image_order=torch.tensor(image_order, dtype=torch.long),
            video_order=torch.tensor(video_order, dtype=torch.long),
            audio_order=torch.tensor(audio_order, dtype=torch.long),
            pooled=torch.from_numpy(pooled_at),
            averaged=torch.from_numpy(averaged_at),
            label_source=torch.from_numpy(label_source),
            label_ids=torch.from_numpy(label_ids),
            asked=torch.from_numpy(asked_at),
            visible_until=torch.from_numpy(visible_until(batch.keys)) if self.looks_ahead else None,
            plain=all(len(row.token_indices) == 1 for row in rows),
            tokens=sum(len(row) for row in rows),
            read=torch.from_numpy(read),
            token_vectors_at=torch.from_numpy(token_vectors_at),
            token_vector_counts=torch.tensor([len(at) for at in embedded], dtype=torch.long),
            blocks=()
            if self.block_cost is None
            else blocks_of(batch.keys, sorted(lengths), self.block_cost, orders, read),
        )


def _token_indices(rows: Sequence[Row], order: np.ndarray, width: int) -> list[np.ndarray]:
    """The flat index of every token of every sequence; row order[j] is stacked j-th."""
    return [
        indices + place * width
        for place, row in zip(np.argsort(order).tolist(), rows, strict=True)
        for indices in row.token_indices
    ]


def embedding_order(groups: Sequence[Sequence[ReadSequence]]) -> list[int]:
    """Indices of the queries, targets, negatives and thoughts, in this order."""
    roles = [s.role for group in groups for s in group]
    return [i for role in EMBEDDED for i, own in enumerate(roles) if own == role]


def concatenated(arrays: Sequence[np.ndarray]) -> Int[np.ndarray, " n"]:
    """One array; of none, an empty one."""
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
