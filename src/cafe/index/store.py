"""LanceDB at arm's length: imported late, its errors translated, one writer at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from cafe.errors import CafeError, DataError, first_line
from cafe.index.rows import VECTOR, vectors_of

logger = logging.getLogger(__name__)

TABLE = "items"

_IDS_AT_ONCE = 1000
_ROWS_AT_ONCE = 8192

_CONSISTENCY = timedelta(seconds=5)
"""How long it takes until an open reader sees what other processes wrote."""


def connect(uri: str) -> Any:
    """The LanceDB database at `uri`. Raises CafeError when LanceDB is not installed."""
    try:
        import lancedb
    except ImportError as error:
        raise CafeError(
            "an index needs LanceDB, which is not installed; install it with "
            "pip install cafe-vlm[search]"
        ) from error
    with lance_errors(uri):
        return lancedb.connect(uri, read_consistency_interval=_CONSISTENCY)


def is_local(uri: str) -> bool:
    """Whether `uri` is a folder of this machine and not in an object store."""
    return "://" not in uri


@contextmanager
def lance_errors(uri: str) -> Iterator[None]:
    """Turn what LanceDB raises into one DataError that names the index."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
        raise DataError(f"index {uri}: {reason(error)}{_fix(uri, str(error))}") from error
    except Exception as error:
        if type(error).__name__ != "RustPanic":
            raise
        raise DataError(f"index {uri}: LanceDB panicked{_fix(uri, 'corrupt')}") from error


_FULL = re.compile("No space left on device|quota exceeded")
_DAMAGED = re.compile(
    r"Not found: \S+\.(lance|manifest|idx)|failed to fill whole buffer|failed to decode"
    r"|size is too small|Invalid (range|direct)|metadata region|references parent|magic|[Cc]orrupt"
)
"""What LanceDB says of files that are missing, cut or overwritten."""


def _fix(uri: str, text: str) -> str:
    if _FULL.search(text):
        return "; free space there, then run the same command again: finished rows are kept"
    if _DAMAGED.search(text):
        return (
            "; the index is damaged: delete it, then make it again: "
            f"cafe index MODEL FOLDER --to {uri}"
        )
    return ""


def reason(error: BaseException) -> str:
    """First line of a Rust error, without positions in LanceDB's source files."""
    return re.sub(r",? \S*\.rs:\d+(:\d+)?", "", first_line(error)).strip().rstrip(",.")


@contextmanager
def only_writer(uri: str) -> Iterator[None]:
    """Allow one writer of a local index at a time; the lock is freed when its process dies.

    An object store has no such lock: let only one process write there.

    Raises:
        DataError: another process is writing, or the folder cannot be written.
    """
    if not is_local(uri):
        yield
        return
    path = Path(uri) / ".writer"
    lock = FileLock(path)
    try:
        path.touch()  # filelock would create the folder of an index that is gone
        lock.acquire(blocking=False)
    except Timeout as error:
        raise DataError(
            f"index {uri}: another process is writing there; wait until it has finished"
        ) from error
    except OSError as error:
        raise DataError(f"index {uri}: cannot be written ({error.strerror or error})") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def one_run(uri: str) -> Iterator[None]:
    """Allow one run of `cafe index` at a time on a local index, which may not exist yet.

    A second one waits for the first, and then finds what that has made.

    Raises:
        DataError: the folder cannot be written.
    """
    if not is_local(uri):
        yield
        return
    path = Path(uri) / ".run"
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            logger.warning("index %s: another run writes it; waiting until it has finished", uri)
            lock.acquire()
    except OSError as error:
        raise DataError(f"index {uri}: cannot be written ({error.strerror or error})") from error
    try:
        yield
    finally:
        lock.release()


def check_top(top: int) -> None:
    """Raises DataError for a number of hits that is none."""
    if top < 1:
        raise DataError(f"top={top}: give the number of hits, 1 or more")


def clauses(ids: Iterable[str]) -> Iterable[str]:
    """SQL conditions that select rows by id, up to 1,000 ids in each."""
    ordered = sorted(ids)
    for start in range(0, len(ordered), _IDS_AT_ONCE):
        names = ("'" + id.replace("'", "''") + "'" for id in ordered[start : start + _IDS_AT_ONCE])
        yield f"id IN ({', '.join(names)})"


def sampled(table: Any, uri: str, count: int) -> tuple[np.ndarray, list[str | None]]:
    """At most `count` of the stored vectors [n, d], always the same ones, and their ids."""
    rows = int(table.count_rows())
    chosen = np.random.default_rng(0).choice(rows, min(count, rows), replace=False)
    with lance_errors(uri):
        found = table.take_offsets(sorted(chosen.tolist())).select(["id", VECTOR]).to_arrow()
    return vectors_of(found), found["id"].to_pylist()


def blocks(table: Any, uri: str) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids and vectors [m, d] of the whole table, a block at a time."""
    with lance_errors(uri):
        for batch in table.search().select(["id", VECTOR]).to_batches(_ROWS_AT_ONCE):
            if len(batch):
                block = pa.Table.from_batches([batch])
                yield block["id"].to_pylist(), vectors_of(block)
