"""Several sources of examples as one numbered set."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Self

import numpy as np

from cafe.data.batches import BatchPlan
from cafe.data.groups import group_numbers
from cafe.data.merge import merge_with_origin
from cafe.errors import DataError
from cafe.types import Example


@dataclass(frozen=True, slots=True)
class ExampleSource:
    """Examples of one task, and how often they are drawn relative to other sources.

    groups   id -> number of its group, of examples that share batches (`cafe.data.groups`)
    """

    name: str
    examples: Sequence[Example]
    weight: float = 1.0
    groups: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """The examples of all sources, numbered consecutively."""

    sources: tuple[ExampleSource, ...]
    _ends: tuple[int, ...]

    @classmethod
    def build(cls, sources: Sequence[ExampleSource], *, merge_by_image: bool = False) -> Self:
        """Join sources.

        Args:
            sources: At least one.
            merge_by_image: Also merge examples about one image, across sources. A merged example
                belongs to the source of its first part; a source without examples left is dropped.

        Raises:
            DataError: A source is empty.
        """
        for source in sources:
            if not source.examples:
                raise DataError(f"{source.name}: no record can be used; see why each was skipped")
        kept = tuple(_merged(sources) if merge_by_image else sources)
        return cls(kept, tuple(accumulate(len(source.examples) for source in kept)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = self._number(index)
        examples = self.sources[number].examples
        return examples[index - (self._ends[number] - len(examples))]

    def source_of(self, index: int) -> ExampleSource:
        """The source that holds example number `index`."""
        return self.sources[self._number(index)]

    def plan(self, batch: int, seed: int) -> BatchPlan:
        """Which examples make up which step. Raises DataError when a source is too small."""
        return BatchPlan(
            sizes=[len(source.examples) for source in self.sources],
            weights=[source.weight for source in self.sources],
            batch=batch,
            seed=seed,
            names=[source.name for source in self.sources],
            targets=[_targets(source.examples) for source in self.sources],
            groups=[group_numbers(source.examples, source.groups) for source in self.sources],
        )

    def _number(self, index: int) -> int:
        return bisect_right(self._ends, index)


def _targets(examples: Sequence[Example]) -> np.ndarray | None:
    """int64 [n]: equal numbers where targets are equal; None when no two of them are."""
    numbers: dict[object, int] = {}
    numbered = [
        numbers.setdefault(_target(index, example), len(numbers))
        for index, example in enumerate(examples)
    ]
    return None if len(numbers) == len(examples) else np.array(numbered, dtype=np.int64)


def _target(index: int, example: Example) -> object:
    """Equal for examples that are no negatives of one another; unique without pair or id."""
    if example.target_id is not None:
        return example.target_id
    if example.target is None:
        return index
    parts = [part for message in example.target for part in message.content]
    return tuple(part if isinstance(part, str) else ("shown", part.key) for part in parts)


def _merged(sources: Sequence[ExampleSource]) -> list[ExampleSource]:
    numbers = [number for number, source in enumerate(sources) for _ in source.examples]
    examples = [example for source in sources for example in source.examples]
    per_source: list[list[Example]] = [[] for _ in sources]
    for origin, example in merge_with_origin(examples):
        per_source[numbers[origin]].append(example)
    return [
        replace(source, examples=kept)
        for source, kept in zip(sources, per_source, strict=True)
        if kept
    ]
