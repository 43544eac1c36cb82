"""Output files that appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cafe.errors import DataError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error.

    Raises DataError, before the block runs, when no file can be written there.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
    try:
        yield unfinished
        with writing(path):
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk or a missing permission is one DataError that names `path`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
