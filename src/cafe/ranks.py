"""One process among those that torchrun started: which it is, which GPU it has, its share of work.

    torchrun --nproc-per-node 4 -m cafe evaluate demo/model --suite paper --data DATA

Without torchrun there is one rank, and nothing here imports torch. Training has its own collective
operations (`cafe.training.distributed`), because it reduces tensors and must survive lost peers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Rank:
    """One process among `size`.

    index   0 to size - 1
    local   index among the processes of this machine, which is that of its GPU
    """

    index: int = 0
    size: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> Rank:
        """The rank that torchrun assigned to this process; the only one without torchrun."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return cls(*(int(os.environ.get(n, d)) for n, d in zip(names, "010", strict=True)))

    @property
    def device(self) -> str | None:
        """The GPU of this rank; None leaves the choice to the model."""
        if self.size == 1:
            return None
        import torch

        return f"cuda:{self.local}" if torch.cuda.is_available() else None

    def owns(self, item: int) -> bool:
        """Whether the item of this index is this rank's (every size-th one)."""
        return item % self.size == self.index

    def share(self, items: Sequence[T], do: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
        """Apply `do` to this rank's items (every size-th one) and gather the results of all ranks.

        Every rank must make the same call, inside `process_group`. Results are gathered as Python
        objects, so any device works.

        Args:
            items: The same on every rank.
            do: Maps a sequence of items to one result each.

        Returns:
            One result per item, in the order of `items`, on every rank.

        Raises:
            Exception: Whatever `do` raised on any rank; it is raised on all of them, so that none
                waits for another that has stopped.
        """
        if self.size == 1:
            return list(do(items))
        import torch.distributed as dist

        outcome: tuple[list[R], BaseException | None]
        own = items[self.index :: self.size]
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
def process_group() -> Iterator[Rank]:
    """The rank of this process; inside the block it exchanges objects with the others over gloo."""
    rank = Rank.from_environment()
    if rank.size == 1:
        yield rank
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield rank
    finally:
        dist.destroy_process_group()
