"""Worker processes that prepare a training run's data, and what happens when one of them dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from cafe.memory import return_memory
from cafe.training.stopping import ignore_signals_in_worker

T = TypeVar("T")

AHEAD = 2
"""Number of chunks that each worker collates ahead of their use."""

_ORPHAN_SECONDS = 2.0
"""How often a worker looks whether its trainer is still there."""

_DEATH_SECONDS = 5.0
"""How long a worker whose connection is lost may take to be seen as dead."""


@contextmanager
def loaded_by_workers(
    dataset: Dataset[T], order: Iterable[Any], workers: int
) -> Iterator[Iterator[T]]:
    """The items of a data set in some order, prepared by `workers` processes, which begin now.

    They end with this process, also when it is killed.
    """
    # A forked worker holds what this process holds: every page that is written here afterwards
    # would be copied for it. An earlier run in this process has left gigabytes of free blocks.
    return_memory()
    loader: DataLoader[T] = DataLoader(
        dataset,
        sampler=order,
        batch_size=None,
        collate_fn=_identity,
        num_workers=workers,
        prefetch_factor=AHEAD,
        worker_init_fn=_prepare_worker,
        generator=torch.Generator(),  # for the workers' seeds; the global stream stays untouched
    )
    items: Any = iter(loader)
    with _without_sigchld_handler():
        try:
            yield while_alive(items)
        finally:
            for worker in items._workers:
                worker.kill()
            items._shutdown_workers()  # as `del items` would, but an error may reference it


def _prepare_worker(number: int) -> None:
    ignore_signals_in_worker(number)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(trainer: int) -> None:
    """End this process once the trainer has died.

    torch's own check comes too late for a worker whose queue is full: nobody reads it any more, so
    the worker waits for ever, with its memory.
    """
    while os.getppid() == trainer:
        time.sleep(_ORPHAN_SECONDS)
    os._exit(1)


def while_alive(items: Any) -> Iterator[Any]:
    """The items. Raises RuntimeError when a worker has died."""
    try:
        yield from items
    except Exception as error:  # its type depends on what the worker was doing
        if isinstance(error, OSError | EOFError):
            # A dying process closes its sockets before it can be waited for, and its sentinel too.
            ended = wait([w.sentinel for w in items._workers], _DEATH_SECONDS)
            for worker in items._workers:
                if worker.sentinel in ended:
                    worker.join(_DEATH_SECONDS)
        dead = [w for w in items._workers if w.exitcode]
        if not dead:
            raise
        raise RuntimeError(f"a data worker ended (exit code {dead[0].exitcode})") from error


@contextmanager
def _without_sigchld_handler() -> Iterator[None]:
    """A context in which torch does not raise in the middle of a step when a worker has died."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, previous)


def _identity(data: Any) -> Any:
    return data
