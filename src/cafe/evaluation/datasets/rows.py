"""Rows of a published data set, from a local folder in the hub's layout or from the hub.

    folder/data/test-00000-of-00001.parquet     any number of parquet files, at any depth
    folder/images/…                             images that rows name by path

An image is a struct {"bytes", "path"} in a row, as `datasets` writes it, or a path. Rows come in
blocks, so a data set of many images never has to fit in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from cafe.data.tables.splits import split_of
from cafe.errors import DataError, quoted
from cafe.files import as_on_disk, check_is_content, files_in
from cafe.types import Image

BLOCK_ROWS = 256
TableRow = dict[str, Any]
RowSource = str | Path
"""A local folder, or the hub's name of a data set."""


def read_rows(source: RowSource, split: str, limit: int | None = None) -> Iterator[TableRow]:
    """The rows of one split, in order, at most `limit`.

    Of a local folder, the parquet files with the split's name as a word in their path; if there are
    none, all parquet files, unless their names say that they are of several splits.

    Raises:
        DataError: nothing there, not readable, no rows, or files of several other splits.
    """
    count = 0
    for row in _rows(source, split):
        if count == limit:
            return
        count += 1
        yield row
    if not count:
        raise DataError(f"{source}: no rows in split {split!r}")


def column(row: TableRow, names: Collection[str], source: RowSource) -> Any:
    """The first of these columns that the row has. Raises DataError when it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    wanted = " or ".join(names)
    raise DataError(f"{source}: a row has no {wanted}; its columns are {', '.join(sorted(row))}")


def row_image(value: Any, folder: RowSource, what: str) -> Image:
    """The image in a row. Raises DataError when there is none, or its file is missing."""
    if isinstance(value, dict) and value.get("bytes"):
        return Image(value["bytes"])
    path = value.get("path") if isinstance(value, dict) else value
    if not path:
        raise DataError(f"{folder}: {what} has no image; the data set is incomplete")
    return local_image(Path(folder), str(path), what)


def inside(folder: Path, name: str, what: str) -> Path:
    """`name` below `folder`. Raises DataError when it would be outside."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DataError(f"{folder}: {what} {quoted(name)} is outside the folder")
    return folder / name


def local_image(folder: Path, name: str, what: str) -> Image:
    """An image inside `folder`. Raises DataError when it is missing, or would be outside."""
    path = as_on_disk(inside(folder, name, f"{what}: image"))
    if not path.is_file():
        raise DataError(f"{path}: no such image ({what}); download the data set's images")
    return Image(path)


@dataclass(slots=True)
class RowIds:
    """The ids of a data set's rows, read one after the other."""

    source: RowSource
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


def _rows(source: RowSource, split: str) -> Iterator[TableRow]:
    if not Path(source).is_dir():
        if isinstance(source, Path) or str(source).count("/") != 1:
            raise DataError(f"{source}: no such folder, and not the name of a data set on the hub")
        yield from _hub_rows(source, split)
        return
    files = [Path(source, file) for file in files_in(Path(source)) if file.suffix == ".parquet"]
    if not files:
        raise DataError(f"{source}: no parquet file in this folder")
    own = [file for file in files if split in _words(file.relative_to(source))]
    others = {name for file in files if (name := split_of(file)) is not None}
    if not own and len(others) > 1:
        raise DataError(
            f"{source}: no parquet file of split {split!r}; there are {', '.join(sorted(others))}"
        )
    for file in own or files:
        check_is_content(file)
        try:
            for batch in pq.ParquetFile(file).iter_batches(BLOCK_ROWS):
                yield from batch.to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise DataError(f"{file}: cannot be read ({error}); download it again") from error


def _hub_rows(name: str, split: str) -> Iterator[TableRow]:
    import datasets

    try:
        data: Any = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises whatever its libraries do
        raise DataError(
            f"data set {name!r} cannot be loaded from the hub ({error}); download it and give its "
            "folder with --data"
        ) from error
    # Arrow gives images as they are stored, undecoded.
    for table in data.with_format("arrow").iter(BLOCK_ROWS):
        yield from table.to_pylist()


def _words(path: Path) -> set[str]:
    return {word for part in path.with_suffix("").parts for word in part.split("-")}
