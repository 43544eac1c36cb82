"""Several processes evaluate one model: each does its share of every call, and all get everything.

Started with `torchrun --nproc-per-node N -m cafe evaluate …`, or on one process as ever. Tasks know
nothing of it: they call `encode`, `generate` and `read` as always, on every rank alike, and only
rank 0 writes results. Shares are gathered as objects over gloo, so any device will do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
import torch.distributed as dist

from cafe.evaluate.calls import Calls
from cafe.evaluate.teacher_forced import Reading
from cafe.types import Conversation, Example, Image

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Rank:
    """One process among `size`; `local` numbers those of one machine."""

    number: int = 0
    size: int = 1
    local: int = 0

    def share(self, items: Sequence[T], do: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
        """`do` on this rank's items (every size-th one), gathered from all ranks in order.

        An error on any rank is raised on all of them, so none waits for another in vain.
        """
        if self.size == 1:
            return list(do(items))
        outcome: tuple[list[R], BaseException | None]
        own = items[self.number :: self.size]
        try:
            outcome = (list(do(own)) if len(own) else [], None)
        except Exception as error:
            outcome = ([], error)
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, outcome)
        for _, error in gathered:
            if error is not None:
                raise error
        merged: list[Any] = [None] * len(items)
        for rank, (results, _) in enumerate(gathered):
            merged[rank :: self.size] = results
        return merged


@contextmanager
def ranks() -> Iterator[Rank]:
    """The own rank, with the others reachable inside the block (what torchrun has set)."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Rank()
        return
    dist.init_process_group("gloo")
    try:
        yield Rank(dist.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class SpreadCalls:
    """A model's calls, each shared among the ranks."""

    calls: Calls
    rank: Rank

    def with_prompt(self, prompt: str) -> Self:
        return replace(self, calls=self.calls.with_prompt(prompt))

    def encode(self, inputs: Sequence[Image | str | Conversation]) -> np.ndarray:
        return np.stack(self.rank.share(inputs, lambda own: list(self.calls.encode(own))))

    def generate(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        return self.rank.share(conversations, lambda own: self.calls.generate(own, max_new_tokens))

    def read(self, examples: Sequence[Example]) -> list[Reading]:
        return self.rank.share(examples, self.calls.read)
