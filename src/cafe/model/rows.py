"""What the collator hands to the model: rows, and chunks of examples made of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """What the model reads, and where to look in what it returns.

    input_ids, subtree_end  int64 [rows, t]   (see `cafe.model.trie`)
    positions      int64 [rows, t]; [axes, rows, t], depth first, for models that count time,
                   height and width apart (M-RoPE)
    image_order    int64 [k]  which picture of the chunk each run of placeholders shows
    pooled         int64 [e]  flat index (row * t + token) of each embedding: queries, targets,
                              then negatives
    label_source   int64 [l]  flat index of the token that predicts each labelled token
    label_ids      int64 [l]  the labelled tokens
    sight_end      int64 [rows, t] where the tokens of a picture see each other; else None
    video_order    int64 [v]  the same as `image_order`, of placeholders that videos alone have
    plain          every row holds one sequence, so causal attention is the whole rule
    """

    input_ids: Tensor
    positions: Tensor
    subtree_end: Tensor
    image_order: Tensor
    pooled: Tensor
    label_source: Tensor
    label_ids: Tensor
    sight_end: Tensor | None = None
    video_order: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    plain: bool = False

    @property
    def depth(self) -> Tensor:
        """int64 [rows, t]: how many tokens of its sequence come before each token."""
        return self.positions if self.positions.ndim == 2 else self.positions[0]

    def to(self, device: torch.device | str) -> Self:
        return _move(self, device)

    @classmethod
    def none(cls) -> Self:
        nothing = torch.zeros(0, dtype=torch.long)
        grid = nothing.view(0, 0)
        return cls(grid, grid, grid, nothing, nothing, nothing, nothing)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some examples of a batch: as many as fit in memory at once.

    ids             the examples, to name them in errors
    rows            all their sequences
    embedding_rows  their embedding sequences only, for the first pass of a cached step
    vision          the vision tensors of their distinct pictures
    pairs           how many of the examples contrast
    target_ids      int64 [pairs]; equal ids are no negatives of one another
    negative_ids    int64 [negatives]
    """

    ids: tuple[str, ...]
    rows: Rows
    embedding_rows: Rows
    vision: dict[str, Tensor] = field(default_factory=dict)
    pairs: int = 0
    target_ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    negative_ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def to(self, device: torch.device | str) -> Self:
        return _move(self, device)

    @property
    def label_count(self) -> int:
        return self.rows.label_ids.numel()


def _move(value: Any, device: torch.device | str) -> Any:
    """A copy of a dataclass with its tensors (nested ones too) on `device`."""

    def moved(item: Any) -> Any:
        if isinstance(item, Tensor):
            return item.to(device, non_blocking=True)
        if isinstance(item, Rows):
            return item.to(device)
        if isinstance(item, dict):
            return {key: moved(inner) for key, inner in item.items()}
        return item

    return replace(value, **{f.name: moved(getattr(value, f.name)) for f in fields(value)})
