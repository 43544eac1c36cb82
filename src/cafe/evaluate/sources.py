"""Rows of a published data set: from a local folder in the hub's layout, or from the hub by name.

    folder/data/test-00000-of-00001.parquet     any number of parquet files, at any depth
    folder/images/…                             pictures that rows name by path

A picture is a struct {"bytes", "path"} in a row, as `datasets` writes it, or a path. Rows come in
blocks, so a data set of many pictures never has to fit in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from cafe.errors import DataError
from cafe.types import Image

BLOCK_ROWS = 256
Row = dict[str, Any]
Source = str | Path
"""A local folder, or the hub's name of a data set."""


def read_rows(source: Source, split: str, limit: int | None = None) -> Iterator[Row]:
    """The rows of one split, in order, at most `limit`.

    A local folder's parquet files are those whose path has the split's name as a word; if none
    has, all of them.

    Raises:
        DataError: nothing there, not readable, or no rows.
    """
    count = 0
    for row in _rows(source, split):
        if count == limit:
            return
        count += 1
        yield row
    if not count:
        raise DataError(f"{source}: no rows in split {split!r}")


def column(row: Row, names: Collection[str], source: Source) -> Any:
    """The first of these columns that the row has. Raises DataError when it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    wanted = " or ".join(names)
    raise DataError(f"{source}: a row has no {wanted}; its columns are {', '.join(sorted(row))}")


def row_image(value: Any, folder: Source, what: str) -> Image:
    """The picture in a row. Raises DataError when there is none, or its file is missing."""
    if isinstance(value, dict) and value.get("bytes"):
        return Image(value["bytes"])
    path = value.get("path") if isinstance(value, dict) else value
    if not path:
        raise DataError(f"{folder}: {what} has no picture; the data set is incomplete")
    return local_image(Path(folder), str(path), what)


def inside(folder: Path, name: str, what: str) -> Path:
    """`name` below `folder`. Raises DataError when it would be outside."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DataError(f"{folder}: {what} {name!r} is outside the folder")
    return folder / name


def local_image(folder: Path, name: str, what: str) -> Image:
    """A picture inside `folder`. Raises DataError when it is missing, or would be outside."""
    path = inside(folder, name, f"{what}: picture")
    if not path.is_file():
        raise DataError(f"{path}: no such picture ({what}); download the data set's pictures")
    return Image(path)


@dataclass(slots=True)
class RowIds:
    """The ids of a data set's rows, read one after the other."""

    source: Source
    _row_of: dict[str, int] = field(default_factory=dict)

    def add(self, id: str, column: str, row: int) -> None:
        """Raises DataError when a row before has this id."""
        first = self._row_of.setdefault(id, row)
        if first != row:
            raise DataError(
                f"{self.source}, row {row}: {column} {id!r} is that of row {first} too; remove one"
            )


def check_unique(ids: Collection[str], source: object) -> None:
    """Raises DataError when two samples have one id."""
    seen: set[str] = set()
    for id in ids:
        if id in seen:
            raise DataError(f"{source}: two samples have the id {id!r}; remove one")
        seen.add(id)


def _rows(source: Source, split: str) -> Iterator[Row]:
    if not Path(source).is_dir():
        if isinstance(source, Path) or str(source).count("/") != 1:
            raise DataError(f"{source}: no such folder, and no name of a data set on the hub")
        yield from _hub_rows(source, split)
        return
    files = sorted(Path(source).rglob("*.parquet"))
    if not files:
        raise DataError(f"{source}: no parquet file in this folder")
    own = [file for file in files if split in _words(file.relative_to(source))]
    for file in own or files:
        try:
            for batch in pq.ParquetFile(file).iter_batches(BLOCK_ROWS):
                yield from batch.to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise DataError(f"{file}: cannot be read ({error}); download it again") from error


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        data: Any = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises whatever its libraries do
        raise DataError(
            f"data set {name!r} cannot be loaded from the hub ({error}); download it and give its "
            "folder with --data"
        ) from error
    # Arrow gives pictures as they are stored, undecoded.
    for table in data.with_format("arrow").iter(BLOCK_ROWS):
        yield from table.to_pylist()


def _words(path: Path) -> set[str]:
    return {word for part in path.with_suffix("").parts for word in part.split("-")}
