"""What the collator hands to the model: rows, and which sequences share one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from cafe.model.image_keys import MediaOrders
from cafe.model.rows.blocks import LengthBlock
from cafe.types import Audio, Conversation, Media, StoredFile

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Int


@dataclass(frozen=True, slots=True)
class Rows:
    """The model's input tokens, and the indices of the states that are read from its output.

    input_ids, subtree_end  int64 [rows, t]   (see `cafe.model.rows.trie`)
    positions      int64 [rows, t]; [axes, rows, t], depth first, for models that count time,
                   height and width apart (M-RoPE)
    image_order    int64 [k]  which image of the chunk each run of placeholders stands for
    pooled         int64 [e]  flat index (row * t + token) of each embedding: queries, targets,
                              then negatives
    averaged       int64 [e, k]  flat indices of the latent tokens whose mean is each embedding;
                              k = 0: it is the state at `pooled`
    label_source   int64 [l]  flat index of the token that predicts each labelled token
    label_ids      int64 [l]  the labelled tokens
    visible_until  int64 [rows, t] where the tokens of an image see each other; else None
    video_order    int64 [v]  as `image_order`, for placeholders that only videos have
    audio_order    int64 [a]  the same for recordings
    plain          every row holds one sequence, so causal attention is the whole rule
    tokens         number of tokens, padding not included
    asked          int64 [q]  flat index of the last token of each match question
    read           int64 [r]  the distinct indices of all that is read, in order
    token_vectors_at   int64 [n]  flat index of every token of the sequences of `pooled`, except
                              those with a thought, one sequence after another; empty: not read
    token_vector_counts   int64 [s]  the number of tokens of each of these sequences
    blocks         rows of similar length (`cafe.model.rows.blocks`); empty: all are one block
    """

    input_ids: Tensor
    positions: Tensor
    subtree_end: Tensor
    image_order: Tensor
    pooled: Tensor
    label_source: Tensor
    label_ids: Tensor
    visible_until: Tensor | None = None
    video_order: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    audio_order: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    plain: bool = False
    tokens: int = 0
    asked: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    averaged: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    read: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    token_vectors_at: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    token_vector_counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    blocks: tuple[LengthBlock, ...] = ()

    @property
    def orders(self) -> MediaOrders:
        """`image_order`, `video_order` and `audio_order`."""
        return self.image_order.tolist(), self.video_order.tolist(), self.audio_order.tolist()

    @property
    def embedded_at(self) -> Tensor:
        """The tokens whose mean state is each embedding, int64 [e, 1] or [e, k]."""
        return self.averaged if self.averaged.shape[1] else self.pooled[:, None]

    @property
    def computed_tokens(self) -> int:
        """Number of tokens that a forward computes, padding included."""
        return sum(b.rows * b.width for b in self.blocks) or self.input_ids.numel()

    def split(self) -> list[Self]:
        """The rows of each block. Of what is read they only know `read`, as their own indices."""
        length, parts = self.input_ids.shape[1], []
        row = image = video = audio = read = 0
        for b in self.blocks:
            rows = slice(row, row + b.rows)
            indices = self.read[read : read + b.read]
            parts.append(
                replace(
                    self,
                    input_ids=self.input_ids[rows, : b.width],
                    positions=self.positions[..., rows, : b.width],
                    subtree_end=self.subtree_end[rows, : b.width],
                    visible_until=None
                    if self.visible_until is None
                    else self.visible_until[rows, : b.width],
                    image_order=self.image_order[image : image + b.images],
                    video_order=self.video_order[video : video + b.videos],
                    audio_order=self.audio_order[audio : audio + b.recordings],
                    read=(indices // length - row) * b.width + indices % length,
                    blocks=(),
                ).without_outputs()
            )
            row, image, video = row + b.rows, image + b.images, video + b.videos
            audio, read = audio + b.recordings, read + b.read
        return parts

    @property
    def depth(self) -> Tensor:
        """How many tokens of its sequence come before each token, int64 [rows, t]."""
        return self.positions if self.positions.ndim == 2 else self.positions[0]

    def to(self, device: torch.device | str) -> Self:
        return each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))

    @classmethod
    def none(cls) -> Self:
        nothing = torch.zeros(0, dtype=torch.long)
        grid = nothing.view(0, 0)
        return cls(grid, grid, grid, nothing, nothing, nothing, nothing)

    def without_outputs(self) -> Self:
        """The same tokens, without embeddings, labels and match questions."""
        nothing = torch.zeros(0, dtype=torch.long)
        return replace(
            self,
            pooled=nothing,
            averaged=nothing.view(0, 0),
            label_source=nothing,
            label_ids=nothing,
            asked=nothing,
            token_vectors_at=nothing,
            token_vector_counts=nothing,
        )


def each_tensor(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a dataclass with `function` applied to its tensors, nested ones too."""

    def applied(item: Any) -> Any:
        if isinstance(item, Tensor):
            return function(item)
        if isinstance(item, Rows):
            return each_tensor(item, function)
        if isinstance(item, dict):
            return {key: applied(inner) for key, inner in item.items()}
        return item

    return replace(value, **{f.name: applied(getattr(value, f.name)) for f in fields(value)})


def shared_rows(keys: Sequence[Int[np.ndarray, " t"]], token_cost: float) -> list[list[int]]:
    """Choose which sequences share a row, so that their common beginning is computed once.

    A row of k sequences computes their common beginnings once (a system turn, an instruction, an
    image that many questions are about), but pays for attention between tokens that do not see
    each other: its mask is dense. So the batch is sorted, which puts equal beginnings next to each
    other, and cut into equal parts; the number of parts is the one that the estimate finds
    cheapest.

    Args:
        keys: of each sequence (`cafe.model.rows.trie`).
        token_cost: cost of one token's matrix products, in tokens attended to at the same cost.

    Returns:
        Indices of `keys`, a list for each row.
    """
    if not keys:
        return []
    order = sorted(range(len(keys)), key=lambda i: keys[i].tobytes())
    lengths = np.array([len(keys[i]) for i in order])
    common = np.array([0, *(_common(keys[a], keys[b]) for a, b in pairwise(order))])

    def cost(begins: np.ndarray) -> float:
        """The cost of all rows, each padded to the longest."""
        added = lengths - common
        added[begins] = lengths[begins]
        longest = int(np.add.reduceat(added, begins).max())
        return len(begins) * longest * (token_cost + longest)

    best = min(_cuts(len(keys)), key=cost)
    return [part.tolist() for part in np.split(np.array(order), best[1:])]


def _cuts(count: int) -> Iterator[np.ndarray]:
    """Where the parts begin, for as many parts as sequences, half as many, ... and one."""
    rows = count
    while True:
        yield np.arange(rows) * count // rows
        if rows == 1:
            return
        rows = (rows + 1) // 2


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def identity(conversation: Conversation | None) -> str:
    """A string that is equal for equal text and images, in every process and run."""
    parts = [p for message in conversation or () for p in message.content]
    return "\x1f".join(p if isinstance(p, str) else f"\x1e{_media_identity(p)}" for p in parts)


def _media_identity(part: Media) -> str:
    """A path, or a hash of the content (a memory address differs from run to run)."""
    match part.source:
        case str() | Path():
            return str(part.source)
        case StoredFile():
            return part.source.name
        case bytes():
            content = [part.source]
        case tuple():
            content = [f.tobytes() if not isinstance(f, Path) else bytes(f) for f in part.source]
        case _:
            content = [part.source.tobytes(), str(part.source.size).encode()]
    if isinstance(part, Audio):
        content.append(f"audio {part.rate} {part.max_seconds}".encode())
    return hashlib.blake2b(b"".join(content), digest_size=16).hexdigest()


def hashes(identities: Sequence[str]) -> Int[Tensor, " n"]:
    """Strings to int64, equal in every process (Python's own hash is salted)."""
    digests = [hashlib.blake2b(i.encode(), digest_size=8).digest() for i in identities]
    return torch.tensor([int.from_bytes(d, "big", signed=True) for d in digests], dtype=torch.long)
