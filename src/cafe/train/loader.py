"""Steps of the plan -> this rank's chunks, collated ahead of time by worker processes.

The data set's index is the step, so a resumed run asks for the step it is at: nothing is skipped
through, and order never depends on the workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from cafe.data.quarantine import Rejected
from cafe.errors import DataError
from cafe.model.collate import Chunk, Collator
from cafe.train.examples import TrainingData
from cafe.train.interrupt import ignore_in_worker
from cafe.types import Conversation, Example


@dataclass(frozen=True, slots=True)
class StepData:
    """What one rank reads in one step.

    chunks     at least one, none of them empty; none only when no example of the run is usable
    rejected   examples that were left out because they cannot be collated
    examples   how many the whole step has, over all ranks, broken ones included
    """

    chunks: list[Chunk]
    rejected: list[Rejected]
    examples: int


@dataclass(frozen=True, slots=True)
class Steps(Dataset[StepData]):
    """Step number (from 0) -> `StepData`.

    chunk         examples that are in memory at once; None: the rank's whole share
    rank, ranks   the rank takes its contiguous share of the step's examples
    """

    data: TrainingData
    collator: Collator
    chunk: int | None
    rank: int = 0
    ranks: int = 1

    def __getitem__(self, step: int) -> StepData:
        indices = self.data.plan.plan(step)
        share = sorted(_share(indices, self.rank, self.ranks), key=self._length)
        size = self.chunk or len(share)
        chunks: list[Chunk] = []
        rejected: list[Rejected] = []
        for begin in range(0, len(share), size):
            chunk, broken = self._collated(share[begin : begin + size])
            rejected += broken
            if chunk is not None:
                chunks.append(chunk)
        if not chunks and (spare := self._spare(indices[-1])) is not None:
            chunks.append(spare)
        return StepData(chunks, rejected, len(indices))

    def _length(self, index: int) -> int:
        """Like lengths share a chunk, so little of it is padding. Equal ones keep their order."""
        return text_length(self.data.examples[index])

    def _collated(self, indices: Sequence[int]) -> tuple[Chunk | None, list[Rejected]]:
        """One chunk; examples that cannot be collated are left out and told."""
        try:
            return self.collator([self.data.examples[index] for index in indices]), []
        except DataError:
            pass  # one of them is broken: find out which
        good: list[Example] = []
        rejected: list[Rejected] = []
        for index in indices:
            example = self.data.examples[index]
            try:
                self.collator([example])
                good.append(example)
            except DataError as error:
                name = self.data.examples.source_of(index).name
                rejected.append(Rejected(name, f"id {example.id!r}", str(error)))
        return (self.collator(good) if good else None), rejected

    def _spare(self, last: int) -> Chunk | None:
        """For a share with no usable example, the next usable one: a rank never stands idle."""
        total = len(self.data.examples)
        for index in range(last + 1, last + total):
            chunk, _ = self._collated([index % total])
            if chunk is not None:
                return chunk
        return None


def text_length(example: Example) -> int:
    """Characters of all that the example says."""
    sides: list[Conversation] = [s for s in (example.query, example.target) if s is not None]
    said = (*sides, *example.negatives, *example.dialogues)
    return sum(len(message.text) for conversation in said for message in conversation)


def _share(indices: Sequence[int], rank: int, ranks: int) -> Sequence[int]:
    """Contiguous, sizes differing by at most one."""
    begin, end = (len(indices) * r // ranks for r in (rank, rank + 1))
    return indices[begin:end]


def step_loader(steps: Steps, begin: int, end: int, workers: int) -> Iterator[StepData]:
    """The data of the steps from `begin` up to `end`, in order, prepared by `workers` processes."""
    loader: DataLoader[StepData] = DataLoader(
        steps,
        sampler=range(begin, end),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=ignore_in_worker if workers else None,
        generator=torch.Generator(),  # seeds of workers; the global stream stays untouched
    )
    return iter(loader)


def _as_it_is(data: Any) -> Any:
    return data
