"""Steps of the plan -> this rank's chunks, collated by worker processes a few ahead of their use.

The order of the chunks is a function of the step alone, so a resumed run asks for its next step
directly, and nothing depends on the workers. They are asked for the chunks of a cached step twice
(`cafe.training.chunks`), and for those of the next step while the last ones are still in use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar

from torch.utils.data import Dataset

from cafe.data.quarantine import Skipped
from cafe.errors import DataError, NoLabelledTokens, TrainingError
from cafe.model.rows.chunk import Chunk
from cafe.model.rows.collate import Collator
from cafe.model.rows.trie import padded_tokens
from cafe.recipes.tree import Batch
from cafe.training.chunks import Collated, StepChunks, StepPlan, chunks_of_tokens
from cafe.training.data import TrainingData
from cafe.training.distributed import rank, world_size
from cafe.training.workers import loaded_by_workers
from cafe.types import Example

T = TypeVar("T")

KEPT_CHUNKS = 8
"""Default number of chunks of a step that are collated once for both passes."""


@dataclass(frozen=True, slots=True)
class StepData:
    """The data of one rank in one step.

    chunks   none of them is empty; an idle one where the rank has no usable example
    """

    chunks: StepChunks

    @property
    def skipped(self) -> list[Skipped]:
        """The examples that cannot be collated, of the chunks that were collated so far."""
        return self.chunks.skipped

    @property
    def examples(self) -> int:
        """Number of examples of the whole step, over all ranks, skipped ones included."""
        return self.chunks.plan.examples


@dataclass(frozen=True, slots=True)
class Steps(Dataset[StepData]):
    """Step number (from 0) -> `StepData`.

    chunk         number of examples of a chunk; None: the rank's whole share
    rank, ranks   the rank takes its contiguous share of the step's examples
    chunk_tokens  largest number of tokens of a chunk, padding included; None: not limited
    keep          number of chunks of a step that are kept for the second pass; the others are
                  collated again
    """

    data: TrainingData
    collator: Collator
    chunk: int | None
    rank: int = 0
    ranks: int = 1
    chunk_tokens: int | None = None
    keep: int = KEPT_CHUNKS

    @classmethod
    def of(cls, batch: Batch, data: TrainingData, collator: Collator) -> Steps:
        """The steps of this process, as a recipe's `batch` says."""
        return cls(
            data,
            collator,
            batch.chunk,
            rank(),
            world_size(),
            batch.chunk_tokens,
            batch.kept_chunks,
        )

    def __getitem__(self, step: int) -> StepData:
        plan = self.plan(step)
        return self.step_data(plan, lambda number, _: self.collated(plan.groups[number], plan.last))

    def step_data(self, plan: StepPlan, collate: Callable[[int, int], Collated]) -> StepData:
        return StepData(StepChunks(plan, collate, self.keep))

    def plan(self, step: int) -> StepPlan:
        """The examples of each chunk of a step."""
        indices = self.data.plan.plan(step)
        share = _share(indices, self.rank, self.ranks)
        oversized = None
        if self.chunk_tokens is None:
            ordered = sorted(share, key=self._text_length)
            size = self.chunk or max(1, len(share))
            groups = [ordered[i : i + size] for i in range(0, len(share), size)]
        else:
            groups, oversized = self._groups_of_tokens(share, self.chunk_tokens)
        return StepPlan(
            groups=tuple(map(tuple, groups)) or ((),),
            last=indices[-1],
            examples=len(indices),
            pairs=sum(self.data.examples[i].query is not None for i in share),
            oversized=oversized,
        )

    def _groups_of_tokens(
        self, share: Sequence[int], budget: int
    ) -> tuple[list[list[int]], tuple[str, int] | None]:
        """The chunks' examples, and the largest of them that exceeds the budget alone."""
        lengths = [self._row_lengths(index) for index in share]
        packed = self.collator.row_tokens
        groups = chunks_of_tokens(lengths, budget, packed)
        sizes = [padded_tokens(rows, packed) for rows in lengths]
        largest = max(range(len(share)), key=sizes.__getitem__, default=None)
        oversized = None
        if largest is not None and sizes[largest] > budget:
            oversized = (self.data.examples[share[largest]].id, sizes[largest])
        return [[share[i] for i in group] for group in groups], oversized

    def _row_lengths(self, index: int) -> list[int]:
        """None of a broken example, which is found again, and reported, when it is collated."""
        try:
            return self.collator.row_lengths(self.data.examples[index])
        except DataError:
            return []

    def _text_length(self, index: int) -> int:
        """Examples of similar length share a chunk, to save padding. Equal ones stay in order."""
        return text_length(self.data.examples[index])

    def collated(self, group: Sequence[int], last: int) -> Collated:
        """One chunk of a step whose last example is number `last`."""
        chunk, skipped = self._collate(group) if group else (None, [])
        if chunk is None and (fallback := self._fallback_chunk(last)) is not None:
            chunk = fallback.idle()
        return Collated(chunk, skipped)

    def _collate(self, indices: Sequence[int]) -> tuple[Chunk | None, list[Skipped]]:
        """One chunk, and the examples that cannot be collated and are skipped."""
        try:
            return self.collator([self.data.examples[index] for index in indices]), []
        except DataError:
            pass  # one of them is broken: find out which
        good: list[Example] = []
        skipped: list[Skipped] = []
        for index in indices:
            example = self.data.examples[index]
            try:
                self.collator([example])
                good.append(example)
            except DataError as error:
                name = self.data.examples.source_of(index).name
                skipped.append(Skipped(name, f"id {example.id!r}", str(error)))
        return (self.collator(good) if good else None), skipped

    def _fallback_chunk(self, last: int) -> Chunk | None:
        """The next usable example, for a chunk without one: all ranks must run a forward."""
        total = len(self.data.examples)
        for index in range(last + 1, last + total):
            chunk, _ = self._collate([index % total])
            if chunk is not None:
                return chunk
        return None


_CHECKED = 8
"""Number of examples with answers, and of steps, that are checked before training begins."""


def check_answers_labelled(steps: Steps) -> None:
    """Check the first examples that have answers, before anything is trained.

    Training itself would not show that no answer token is labelled: its loss falls on control
    tokens alone. Every rank checks the same examples.

    Raises:
        TrainingError: None of them has a labelled token.
    """
    planned = (
        i for step in range(min(steps.data.steps, _CHECKED)) for i in steps.data.plan.plan(step)
    )
    examples = (steps.data.examples[i] for i in planned)
    failure: NoLabelledTokens | None = None
    for example in islice((e for e in examples if e.dialogues), _CHECKED):
        try:
            steps.collator([example])
            return
        except NoLabelledTokens as error:
            failure = failure or error
        except DataError:
            continue  # broken in another way: it will be skipped and reported
        except Exception:
            return  # unforeseen: the run itself meets it, and reports it with the step
    if failure is not None:
        raise TrainingError(
            "no answer of the first examples would be learned, though objective.language_weight "
            f"is not 0 ({failure}); check the model's chat template and objective.compat"
        ) from failure


def text_length(example: Example) -> int:
    """Number of characters in all texts of the example."""
    return sum(len(message.text) for turns in example.conversations for message in turns)


def _share(indices: Sequence[int], rank: int, ranks: int) -> Sequence[int]:
    """A rank's contiguous share of the indices; sizes differ by at most one."""
    begin, end = (len(indices) * r // ranks for r in (rank, rank + 1))
    return indices[begin:end]


def step_loader(
    steps: Steps, begin: int, end: int, workers: int
) -> Generator[StepData, None, None]:
    """The data of the steps from `begin` up to `end`, in order, prepared by `workers` processes.

    A step's chunks are to be used before the next step is asked for. Closing the generator kills
    the workers: they ignore SIGTERM, and Python's exit would wait for them forever.

    Raises:
        RuntimeError: A worker has died.
    """
    if workers == 0:
        yield from (steps[step] for step in range(begin, end))
        return
    with _planned(steps, range(begin, end)) as plans:
        requests = _Requests(plans, steps.keep)
        with loaded_by_workers(_ChunkData(steps), requests, workers) as chunks:
            for step in range(begin, end):
                plan = requests.plan_of(step)
                yield steps.step_data(plan, partial(_taken, steps, requests, chunks, step, plan))
                while requests.issued and requests.issued[0].step == step:
                    requests.issued.popleft()
                    next(chunks)


@dataclass(frozen=True, slots=True)
class _Request:
    """Chunk `number` of a step, which was collated `times` times before.

    group   its examples
    last    number of the step's last example
    """

    step: int
    number: int
    times: int
    group: tuple[int, ...]
    last: int


@dataclass(slots=True)
class _Requests:
    """All chunks of a run in the order of their use; a step's are known from its plan on.

    plans   the plan of each step, in order
    issued  the requests whose chunks were not used yet
    """

    plans: Iterator[tuple[int, StepPlan]]
    keep: int
    issued: deque[_Request] = field(default_factory=deque, init=False)
    _known: deque[tuple[int, StepPlan]] = field(default_factory=deque, init=False)

    def __iter__(self) -> Iterator[_Request]:
        for step, plan in self.plans:
            self._known.append((step, plan))
            count = len(plan.groups)
            passes = [range(count), range(self.keep, count)]
            for times, numbers in enumerate(passes if count > 1 else passes[:1]):
                for number in numbers:
                    request = _Request(step, number, times, plan.groups[number], plan.last)
                    self.issued.append(request)
                    yield request

    def plan_of(self, step: int) -> StepPlan:
        """The plan of a step. Its first chunk is asked for before the step is needed."""
        while self._known[0][0] < step:
            self._known.popleft()
        return self._known[0][1]


def _taken(
    steps: Steps,
    requests: _Requests,
    chunks: Iterator[Collated],
    step: int,
    plan: StepPlan,
    number: int,
    times: int,
) -> Collated:
    """The next chunk from the workers; one that was not asked for is collated here."""
    wanted = _Request(step, number, times, plan.groups[number], plan.last)
    if not requests.issued or requests.issued[0] != wanted:
        return steps.collated(wanted.group, wanted.last)
    requests.issued.popleft()
    collated = next(chunks)
    if collated.chunk is not None and number < steps.keep and len(plan.groups) > 1:
        return Collated(collated.chunk.copy(), collated.skipped)  # it stays for longer
    return collated


@dataclass(frozen=True, slots=True)
class _ChunkData(Dataset[Collated]):
    """Request -> chunk, in a worker."""

    steps: Steps

    def __getitem__(self, request: _Request) -> Collated:
        return self.steps.collated(request.group, request.last)


@dataclass(frozen=True, slots=True)
class _PlanData(Dataset[tuple[int, StepPlan]]):
    """Step -> plan, in a worker."""

    steps: Steps

    def __getitem__(self, step: int) -> tuple[int, StepPlan]:
        return step, self.steps.plan(step)


@contextmanager
def _planned(steps: Steps, numbers: range) -> Iterator[Iterator[tuple[int, StepPlan]]]:
    """The plans of steps. Measuring rows takes time, so a process of its own does it ahead."""
    if steps.chunk_tokens is None:
        yield ((step, steps.plan(step)) for step in numbers)
        return
    with loaded_by_workers(_PlanData(steps), numbers, 1) as plans:
        yield plans
