"""A step's examples in chunks, and chunks that are collated only when the step needs them.

The pixels of a batch do not fit in memory where the batch does: 4,096 images of 5 views are 36 GB.
So a chunk is collated when it is its turn, and again for the second pass of a cached step, unless
it is one of the first few, which are kept. What stays of every example over the whole step is its
name, the hashes of its content, its embeddings and their gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cafe.data.quarantine import Skipped
from cafe.errors import TrainingError
from cafe.model.rows.chunk import Chunk
from cafe.model.rows.trie import padded_tokens


def chunks_of_tokens(
    lengths: Sequence[Sequence[int]], budget: int, max_packed: int | None
) -> list[list[int]]:
    """Divide examples into chunks of similar row lengths, each within a number of tokens.

    Args:
        lengths: For each example, the lengths of its rows; none if they are not known.
        budget: Largest number of tokens of a chunk, padding included. An example that exceeds it
            alone is a chunk of its own.
        max_packed: Rows are packed up to this length; None: they are not.

    Returns:
        The indices of the examples of each chunk, the shortest rows first.
    """
    chunks: list[list[int]] = []
    rows: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: max(lengths[i], default=0)):
        together = [*rows, *lengths[index]]
        if chunks and padded_tokens(together, max_packed) <= budget:
            chunks[-1].append(index)
            rows = together
        else:
            chunks.append([index])
            rows = [*lengths[index]]
    return chunks


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Which examples one rank has in one step.

    groups     the examples of each chunk, by their numbers; at least one group, which is empty
               where the rank has no example
    last       number of the step's last example: usable ones are searched after it
    examples   number of examples of the whole step, over all ranks
    pairs      number of contrastive pairs of this rank, if all examples can be used
    oversized  id of an example whose rows exceed `batch.chunk_tokens` alone, and their tokens
    """

    groups: tuple[tuple[int, ...], ...]
    last: int
    examples: int
    pairs: int
    oversized: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Collated:
    """One chunk, and the examples of its group that are not in it because they cannot be used.

    chunk   an idle one of another example where no example of the group can be used; None where no
            example of the run can
    """

    chunk: Chunk | None
    skipped: list[Skipped]


class StepChunks:
    """A rank's chunks of one step. Each iteration collates those again that are not kept.

    plan      the examples of each chunk
    skipped   the examples that cannot be used, of the chunks that were collated so far
    waited    seconds that were spent waiting for chunks so far
    """

    def __init__(self, plan: StepPlan, collate: Callable[[int, int], Collated], keep: int) -> None:
        """
        Args:
            plan: Which examples the chunks hold.
            collate: Number of a chunk, and how often it was collated before -> the chunk. Equal
                numbers give equal chunks.
            keep: Number of chunks that are kept once they are collated, from the first on.
        """
        self.plan = plan
        self.skipped: list[Skipped] = []
        self.waited = 0.0
        self._collate, self._keep = collate, keep
        self._kept: dict[int, Chunk] = {}
        self._times = [0] * len(plan.groups)
        self._ids: dict[int, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self.plan.groups)

    def __getitem__(self, number: int) -> Chunk:
        if not 0 <= number < len(self):
            raise IndexError(f"chunk {number} of {len(self)}")
        if number in self._kept:
            return self._kept[number]
        chunk = self._collated(number)
        assert chunk is not None, "`usable` is to be asked first"
        return chunk

    def __iter__(self) -> Iterator[Chunk]:
        return (self[number] for number in range(len(self)))

    def usable(self) -> bool:
        """Whether there is a chunk to train on: False if no example of the run can be used."""
        return bool(self._kept) or self._collated(0) is not None

    def _collated(self, number: int) -> Chunk | None:
        started = time.perf_counter()
        collated = self._collate(number, self._times[number])
        self.waited += time.perf_counter() - started
        if self._times[number] == 0:
            self.skipped += collated.skipped
        self._times[number] += 1
        chunk = collated.chunk
        if chunk is None:
            return None
        if changed := sorted({*chunk.ids} ^ {*self._ids.setdefault(number, chunk.ids)}):
            raise TrainingError(
                f"the data changed during a step: example {changed[0]!r} can be used in one of its "
                f"two passes only{_reason(collated.skipped)}; check the disk, then resume"
            )
        if number < self._keep:
            self._kept[number] = chunk
        return chunk


def _reason(skipped: Sequence[Skipped]) -> str:
    return f" ({skipped[0].reason})" if skipped else ""


def planned_pairs(chunks: Sequence[Chunk] | StepChunks) -> int:
    """Number of contrastive pairs, known before anything is collated; broken ones count."""
    if isinstance(chunks, StepChunks):
        return chunks.plan.pairs
    return sum(chunk.pairs for chunk in chunks)
