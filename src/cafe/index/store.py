"""LanceDB at arm's length: imported late, its errors told as ours, one writer at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from cafe.errors import CafeError, DataError

TABLE = "items"

_IDS_AT_ONCE = 1000

_CONSISTENCY = timedelta(seconds=5)
"""A reader that stays open sees what others wrote after so long."""


def connect(uri: str) -> Any:
    """The LanceDB database at `uri`. Raises CafeError when LanceDB is not installed."""
    try:
        import lancedb
    except ImportError as error:
        raise CafeError(
            "an index needs LanceDB, which is not installed; install it with "
            "pip install cafe-vlm[search]"
        ) from error
    with told(uri):
        return lancedb.connect(uri, read_consistency_interval=_CONSISTENCY)


def is_local(uri: str) -> bool:
    """Whether `uri` is a folder here, and not an object store's."""
    return "://" not in uri


@contextmanager
def told(uri: str) -> Iterator[None]:
    """What LanceDB raises becomes one DataError that names the index."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
        raise DataError(f"index {uri}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """A Rust error's first line, without the places in sources that nobody here has."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r",? \S*\.rs:\d+(:\d+)?", "", line).strip().rstrip(",.")


@contextmanager
def only_writer(uri: str) -> Iterator[None]:
    """One writer of a local index at a time; the system frees the lock when a process dies.

    An object store has no such lock: there, let one process write. Raises DataError when another
    process is writing.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None
    if fcntl is None or not is_local(uri):
        yield
        return
    try:
        lock = (Path(uri) / ".writer").open("w")
    except OSError as error:
        raise DataError(f"index {uri}: cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"index {uri}: another process is writing there; wait until it has finished"
            ) from error
        yield


def clauses(ids: Iterable[str]) -> Iterable[str]:
    """SQL for rows with these ids, so many at a time."""
    everything = sorted(ids)
    for start in range(0, len(everything), _IDS_AT_ONCE):
        names = (
            "'" + id.replace("'", "''") + "'" for id in everything[start : start + _IDS_AT_ONCE]
        )
        yield f"id IN ({', '.join(names)})"
