"""Some examples of a batch, collated: what a training step reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from cafe.model.rows.matching import MatchSides
from cafe.model.rows.rows import Rows, each_tensor
from cafe.types import Example


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some examples of a batch: as many as fit in memory together (GradCache's sub-batch).

    ids             the examples' names, for errors
    rows            all their sequences
    embedding_rows  their embedding sequences only, for the first pass of a cached step
    vision          the vision tensors of their distinct images
    pairs           number of examples with a query and a target
    target_ids      int64 [pairs]; pairs with equal ids are not negatives of each other
    negative_ids    int64 [negatives], by content
    query_ids       int64 [pairs]; equal for queries of equal content
    content_ids     int64 [pairs]; the same, of targets
    query_thoughts  int64 [q], the pairs whose query has a thought; `Rows.pooled` ends with them
    target_thoughts  int64 [t], the same, of targets, which come last
    scored          int64 [l, 2], pair and candidate that a teacher scored; candidates are numbered
                    targets, then negatives
    scores          float64 [l], the teacher's
    match           what match questions can be asked; None: they are not trained
    """

    ids: tuple[str, ...]
    rows: Rows
    embedding_rows: Rows
    vision: dict[str, Tensor] = field(default_factory=dict)
    pairs: int = 0
    target_ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    negative_ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    query_ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    content_ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    query_thoughts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    target_thoughts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    scored: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.long))
    scores: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    match: MatchSides | None = None

    def to(self, device: torch.device | str) -> Self:
        return each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))

    def copy(self) -> Self:
        """The same in memory of this process.

        A tensor from a data worker is a file in shared memory, which stays open with it.
        """
        return each_tensor(self, Tensor.clone)

    def without_inputs(self) -> Self:
        """What the contrastive loss needs to know of the chunk, without its rows and images."""
        match = None if self.match is None else self.match.without_rows()
        none = Rows.none()
        return replace(self, rows=none, embedding_rows=none, vision={}, match=match).copy()

    def idle(self) -> Self:
        """The same rows without pairs and labels: nothing is learned from them.

        For a rank that has no example left but must take part in the collective operations.
        """
        nothing = torch.zeros(0, dtype=torch.long)
        return replace(
            self,
            rows=self.rows.without_outputs(),
            embedding_rows=self.embedding_rows.without_outputs(),
            pairs=0,
            target_ids=nothing,
            negative_ids=nothing,
            query_ids=nothing,
            content_ids=nothing,
            query_thoughts=nothing,
            target_thoughts=nothing,
            scored=nothing.view(0, 2),
            scores=nothing.double(),
            match=None,
        )

    @property
    def label_count(self) -> int:
        return self.rows.label_ids.numel()


def teacher_scores(pairs: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """`Chunk.scored` and `Chunk.scores` of a chunk's pairs."""
    cells: list[tuple[int, int]] = []
    scores: list[float] = []
    negatives = len(pairs)
    for pair, example in enumerate(pairs):
        if example.scores is not None:
            candidates = [pair, *range(negatives, negatives + len(example.negatives))]
            cells += [(pair, candidate) for candidate in candidates]
            scores += example.scores
        negatives += len(example.negatives)
    return (
        torch.tensor(cells, dtype=torch.long).view(-1, 2),
        torch.tensor(scores, dtype=torch.float64),
    )


def numbers_of(values: Sequence[object | None]) -> Tensor:
    """The indices of the values that are there, int64 [n]."""
    there = [i for i, value in enumerate(values) if value is not None]
    return torch.tensor(there, dtype=torch.long)
