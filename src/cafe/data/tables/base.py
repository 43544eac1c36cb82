"""Records as they are stored, before anybody asks what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cafe.errors import DataError


@dataclass(frozen=True, slots=True)
class Raw:
    """One record.

    place     where it stands, for messages: "line 7"
    id        its name, if it brings no `id` of its own
    content   what should be an object; a DataError where it cannot be read
    """

    place: str
    id: str
    content: Any


@dataclass(frozen=True, slots=True)
class Table:
    """A file or data set of records.

    name      for messages
    folder    where the paths of pictures start; None: nowhere
    columns   None: every record has its own
    rows      the records in order, from the first, each time it is called
    """

    name: str
    folder: Path | None
    columns: frozenset[str] | None
    rows: Callable[[], Iterator[Raw]]


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cannot_be_read(path: object, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return DataError(f"{path}: cannot be read ({reason})")
