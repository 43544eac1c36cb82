"""The key-value cache of rows that come and go while the others are decoded.

transformers' `DynamicCache` serves one batch from its first token to its last. Here rows end at the
right edge, so that all of them write their next token into one new column; shorter ones are padded
on the left, which the attention mask hides. Rows leave by selection, and join by concatenation.

Layers that see a window keep all of their keys, and the mask alone hides what is too far away: so
the beginning of a row can be taken out again, and continued. Layers that carry a state (Qwen3.5,
LFM2) have one of fixed size for each row, which joins and leaves as keys do, but cannot be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from cafe.errors import FamilyError

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

LayerKeys = tuple[Tensor, Tensor] | None
"""Keys and values of one row in one layer, [1, heads, tokens, width]; None: it keeps none."""


SPARE_COLUMNS = 64
"""By how many columns a layer's memory grows at a time."""


class RoomyLayer(DynamicLayer):
    """transformers' layer of keys and values, with room for the next tokens.

    That one copies all of its keys for every token. Here a token is written into spare columns, as
    long as `keys` and `values` are those that the last update returned.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rooms: list[tuple[Tensor, Tensor]] = []  # memory, and its part that is in use

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As in transformers: the new keys and values are added, and all are returned."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rooms = self._rooms or [(key_states, key_states), (value_states, value_states)]
        self._rooms = [
            _extended(used, new, *room)
            for used, new, room in zip(
                (self.keys, self.values), (key_states, value_states), rooms, strict=True
            )
        ]
        (_, self.keys), (_, self.values) = self._rooms
        return self.keys, self.values


def _extended(used: Any, new: Tensor, room: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Memory with `new` after what is used of it, and the part that is then in use."""
    begin = used.shape[2] if used.ndim == new.ndim else 0
    end = begin + new.shape[2]
    if used is not last or room.shape[2] < end:
        room = new.new_empty(*new.shape[:2], end + SPARE_COLUMNS, new.shape[3])
        if begin:
            room[:, :, :begin] = used
    room[:, :, begin:end] = new
    return room, room[:, :, :end]


def new_cache(config: Any) -> DynamicCache:
    """An empty cache of a model's language model.

    Raises:
        FamilyError: it has layers whose cache cannot be joined.
    """
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            cache.layers[i] = RoomyLayer()
    known = (RoomyLayer, LinearAttentionLayer, DummyLayer)
    unknown = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in known})
    if unknown:
        raise FamilyError(
            f"model type {config.model_type!r}: rows of its cache cannot come and go, because of "
            f"its {', '.join(unknown)}"
        )
    return cache


class RowCache:
    """Keys, values and states of some rows.

    cache   transformers', which the model's forward fills
    real    bool [rows, columns]; False: padding
    """

    def __init__(self, config: Any, real: Bool[Tensor, "rows columns"]) -> None:
        """An empty cache, for rows whose first columns will be `real`."""
        self.cache: Any = new_cache(config)
        self.real = real

    @classmethod
    def of_beginnings(cls, config: Any, rows: Sequence[Sequence[LayerKeys]]) -> Self:
        """Rows that begin with what `beginning` returned, each with its own length."""
        first = next(pair for pair in rows[0] if pair is not None)[0]
        lengths = [next(p for p in row if p is not None)[0].shape[2] for row in rows]
        columns = torch.arange(max(lengths), device=first.device)
        starts = max(lengths) - torch.tensor(lengths, device=first.device)
        made = cls(config, columns >= starts[:, None])
        for i, layer in enumerate(made.cache.layers):
            pairs = [pair for row in rows if (pair := row[i]) is not None]
            if pairs:
                layer.update(*(torch.cat(_level([p[side] for p in pairs])) for side in (0, 1)))
        return made

    def __len__(self) -> int:
        return len(self.real)

    def add_columns(self, real: Bool[Tensor, "rows new"]) -> Int[Tensor, "rows columns"]:
        """Note the columns that the next forward writes; returns its attention mask."""
        self.real = torch.cat([self.real, real], dim=1)
        return self.real.long()

    def align_right(self) -> None:
        """Move padding at the right end of rows to their left."""
        columns = self.real.shape[1]
        at = torch.arange(columns, device=self.real.device)
        trailing = columns - 1 - torch.where(self.real, at, -1).amax(dim=1)
        if not trailing.any():
            return
        index = (at - trailing[:, None]) % columns
        self.real = self.real.gather(1, index)
        self._map_keys(lambda x: x.gather(2, index[:, None, :, None].expand_as(x)))

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows only, and no columns that are padding in all of them."""
        index = torch.tensor(rows, device=self.real.device)
        real = self.real[index]
        first = int(real.any(dim=0).int().argmax())
        self.real = real[:, first:]
        self._map_keys(lambda x: x[index, :, first:])
        self._map_states(lambda x, _: x[index])

    def join(self, other: Self) -> None:
        """Take over the rows of another cache, after one's own."""
        self.real = torch.cat(_level([self.real, other.real], dim=1))
        for mine, its in zip(self.cache.layers, other.cache.layers, strict=True):
            if _has_keys(mine):
                mine.keys = torch.cat(_level([mine.keys, its.keys]))
                mine.values = torch.cat(_level([mine.values, its.values]))
        states = [
            state for layer in other.cache.layers for state in _states(layer)
        ]  # in the order in which `_map_states` meets them
        self._map_states(lambda x, i: torch.cat([x, states[i]]))

    def beginning(self, row: int, tokens: int) -> list[LayerKeys]:
        """A copy of the first `tokens` of a row. Not for layers that carry a state."""
        start = int(self.real[row].int().argmax())
        part = slice(row, row + 1), slice(None), slice(start, start + tokens)
        return [
            (layer.keys[part].clone(), layer.values[part].clone()) if _has_keys(layer) else None
            for layer in self.cache.layers
        ]

    def _map_keys(self, function: Callable[[Tensor], Tensor]) -> None:
        for layer in self.cache.layers:
            if _has_keys(layer):
                layer.keys, layer.values = function(layer.keys), function(layer.values)

    def _map_states(self, function: Callable[[Tensor, int], Tensor]) -> None:
        """Replace every state of a layer, which `function` gets with its number."""
        number = 0
        for layer in self.cache.layers:
            for states in _state_groups(layer):
                for name, state in states.items():
                    if state is not None:
                        states[name] = function(state, number)
                        number += 1


def _has_keys(layer: Any) -> bool:
    return isinstance(layer, DynamicLayer) and layer.keys is not None


def _state_groups(layer: Any) -> list[dict[int, Tensor | None]]:
    if not isinstance(layer, LinearAttentionLayer):
        return []
    return [layer.conv_states, layer.recurrent_states]


def _states(layer: Any) -> list[Tensor]:
    return [s for states in _state_groups(layer) for s in states.values() if s is not None]


def _level(tensors: Sequence[Tensor], dim: int = 2) -> list[Tensor]:
    """Tensors padded on the left to one size along `dim`."""
    longest = max(x.shape[dim] for x in tensors)
    return [
        functional.pad(x, (0, 0) * (x.ndim - 1 - dim) + (longest - x.shape[dim], 0))
        for x in tensors
    ]
