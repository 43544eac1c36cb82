"""Parquet files, and everything that the `datasets` library reads.

Text is read through once; images stay where they are. A table with images inside is opened by
`datasets`, which writes it to its cache (HF_DATASETS_CACHE) as memory-mapped Arrow the first time:
parquet itself gives no single cell without decoding its whole row group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cafe.data.records import RawRecord, Table, cannot_be_read
from cafe.data.tables.splits import BUILDERS, chosen_split, files_of_split, unusual_splits
from cafe.errors import DataError, ImageError, first_line
from cafe.types import StoredFile

HUB = "hub:"
"""`hub:OWNER/NAME` or `hub:OWNER/NAME:CONFIG`: a data set of the Hugging Face hub."""

_ROWS = 1000  # read at a time


@dataclass(frozen=True, slots=True, eq=False)
class Cell(StoredFile):
    """One image of a memory-mapped table, read when asked for.

    column   the table's one column, in arrow format (a `datasets.Dataset`: cheap to send to
             workers)
    item     which of the cell's images, where it holds a list
    """

    table: str
    column: Any
    row: int
    item: int | None = None

    @property
    def name(self) -> str:
        item = "" if self.item is None else f"[{self.item}]"
        return f"{self.table}, row {self.row + 1}, {self.column.column_names[0]}{item}"

    def read(self) -> bytes:
        """Raises ImageError when the file is not what it was."""
        try:
            value = self.column[self.row].column(0)[0].as_py()
            value = value if self.item is None else value[self.item]
            return value if isinstance(value, bytes) else value["bytes"]
        except Exception as error:  # a cache file that was removed or cut: arrow has many errors
            raise ImageError(f"{self.name}: cannot be read ({first_line(error)})") from error


def parquet(path: Path) -> Table:
    """One parquet file. Raises DataError when it is none."""
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise cannot_be_read(path, error) from error
    if any(_holds_images(field.type) for field in schema):
        from datasets import Dataset

        try:
            dataset = Dataset.from_parquet(str(path))
        except Exception as error:
            raise cannot_be_read(path, error) from error
        return dataset_table(dataset, str(path), path.parent)

    def rows() -> Iterator[RawRecord]:
        number = 0
        try:
            for batch in pq.ParquetFile(path).iter_batches(_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield RawRecord(f"row {number}", f"{path.stem}-{number}", record)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path}: broken after row {number} ({first_line(error)}); fetch it again"
            ) from error

    return Table(str(path), path.parent, frozenset(schema.names), rows)


def hub(name: str, split: str | None) -> Table:
    """`hub:OWNER/NAME[:CONFIG]`. Raises DataError when it cannot be had."""
    from datasets import load_dataset

    owner_and_name, _, config = name.removeprefix(HUB).partition(":")
    try:
        loaded = load_dataset(owner_and_name, config or None)
    except Exception as error:  # no network, no such data set, no access, …
        raise DataError(f"{name}: cannot be loaded from the hub ({first_line(error)})") from error
    return dataset_table(_one_split(loaded, split, name), name, None)


def dataset_folder(path: Path, split: str | None) -> Table:
    """A folder that `datasets` wrote (`save_to_disk`) or can read (its parquet or JSON files)."""
    from datasets import load_dataset, load_from_disk

    saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    files = [] if saved else unusual_splits(path)
    if files:
        files = files_of_split(files, split, str(path))
    try:
        if files:
            builder = BUILDERS[files[0].suffix.lower()]
            loaded = load_dataset(builder, data_files=[str(file) for file in files], split="train")
        else:
            loaded = load_from_disk(str(path)) if saved else load_dataset(str(path))
    except Exception as error:
        raise DataError(
            f"{path}: no data set in this folder ({first_line(error)}). A folder holds "
            "metadata.jsonl or metadata.csv with its images, tar shards, or files that the "
            "datasets library reads"
        ) from error
    return dataset_table(_one_split(loaded, split, str(path)), str(path), path)


def dataset_table(dataset: Any, name: str, folder: Path | None) -> Table:
    """A `datasets.Dataset` as a table; images of top-level columns stay in it."""
    if dataset._indices is not None:  # a selection: rows are not where their number says
        dataset = dataset.flatten_indices()
    schema = dataset.data.schema
    images = [field.name for field in schema if _holds_images(field.type)]
    texts = dataset.remove_columns(images).with_format("arrow")
    cells = {column: dataset.select_columns([column]).with_format("arrow") for column in images}

    def rows() -> Iterator[RawRecord]:
        for begin in range(0, len(dataset), _ROWS):
            count = min(_ROWS, len(dataset) - begin)
            columns: dict[str, list[Any]] = {
                column: _references(
                    dataset.data.column(column).slice(begin, count), begin, cell, name
                )
                for column, cell in cells.items()
            }
            if texts.column_names:
                columns |= texts[begin : begin + count].to_pydict()
            for i in range(count):
                number = begin + i + 1
                record = {column: values[i] for column, values in columns.items()}
                yield RawRecord(f"row {number}", f"row-{number}", record)

    return Table(name, folder, frozenset(schema.names), rows)


def _one_split(loaded: Any, split: str | None, name: str) -> Any:
    from datasets import DatasetDict

    if not isinstance(loaded, DatasetDict):
        return loaded
    return loaded[chosen_split([str(key) for key in loaded], split, name)]


def _holds_images(type: pa.DataType) -> bool:
    """Encoded files: bytes, the struct that `datasets` stores images as, or lists of these."""
    if pa.types.is_list(type) or pa.types.is_large_list(type):
        return _holds_images(type.value_type)
    if pa.types.is_struct(type):
        return type.get_field_index("bytes") >= 0 and type.get_field_index("path") >= 0
    return pa.types.is_binary(type) or pa.types.is_large_binary(type)


def _references(column: pa.ChunkedArray, begin: int, cells: Any, table: str) -> list[Any]:
    """For each row its `Cell`, a path, None, or a list of these; no image is read."""
    references: list[Any] = []
    for chunk in column.chunks:
        row = begin + len(references)
        if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
            values = _stored(chunk.flatten())
            at = 0
            for i, length in enumerate(chunk.value_lengths().to_pylist()):
                group = values[at : at + (length or 0)]
                references.append(
                    [
                        Cell(table, cells, row + i, k) if value is True else value
                        for k, value in enumerate(group)
                    ]
                )
                at += length or 0
        else:
            references += [
                Cell(table, cells, row + i) if value is True else value
                for i, value in enumerate(_stored(chunk))
            ]
    return references


def _stored(values: pa.Array) -> list[bool | str | None]:
    """True where bytes are; else the path, or None."""
    if not pa.types.is_struct(values.type):
        return [True if valid else None for valid in values.is_valid().to_pylist()]
    fields = dict(zip((f.name for f in values.type), values.flatten(), strict=True))
    present, paths = fields["bytes"].is_valid().to_pylist(), fields["path"].to_pylist()
    return [True if here else path for here, path in zip(present, paths, strict=True)]
