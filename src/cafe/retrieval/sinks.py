"""Where embeddings go: Parquet files, one or one per shard, or a LanceDB table.

A Parquet file is written block by block:

    id: string    text: string, path: string (where the input has them)
    generated_caption: string (where images are embedded with captions)
    embedding: fixed_size_list<float32>[dimensions]
    schema metadata "cafe.model": the model that was named

In a LanceDB table a shard is one write, and its rows name it in the column "shard".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cafe.files import replacing, writing
from cafe.index import GENERATED_CAPTION, ContentKind, Index, IndexRow
from cafe.retrieval.blocks import Block, LoadedRecord


class Sink(Protocol):
    """Where shards go. A shard is written whole, or not at all."""

    @property
    def uri(self) -> str:
        """The folder or table, for messages."""
        ...

    @property
    def unique_ids(self) -> bool:
        """Whether a repeated id is a broken record."""
        ...

    def finished(self) -> set[int]:
        """Shards that are there."""
        ...

    def path(self, shard: int) -> Path | None:
        """The file of a shard, if it has one of its own."""
        ...

    def write(self, shard: int, blocks: Iterable[Block]) -> None: ...

    def complete(self) -> None:
        """Called once all shards are there and no other process writes."""
        ...


@dataclass(frozen=True, slots=True)
class FileSink:
    """`OUT/00000.parquet`, …; `model` is the name that they keep."""

    out: Path
    columns: tuple[str, ...]
    model: str
    dimension: int
    unique_ids: bool = False

    @property
    def uri(self) -> str:
        return str(self.out)

    def finished(self) -> set[int]:
        return {int(file.stem) for file in self.out.glob("[0-9]*.parquet") if file.stem.isdecimal()}

    def path(self, shard: int) -> Path:
        return self.out / f"{shard:05d}.parquet"

    def write(self, shard: int, blocks: Iterable[Block]) -> None:
        with (
            replacing(self.path(shard)) as unfinished,
            EmbeddingTable(unfinished, self.columns, self.model, self.dimension) as table,
        ):
            for rows, embeddings in blocks:
                table.append(rows, embeddings)

    def complete(self) -> None: ...


@dataclass(frozen=True, slots=True)
class TableSink:
    """A LanceDB table; paths in it start at `root`. A shard is kept in memory, then appended."""

    uri: str
    root: Path | None
    unique_ids: bool = True

    def finished(self) -> set[int]:
        return self._index.values("shard")

    def path(self, shard: int) -> None:
        return None

    def write(self, shard: int, blocks: Iterable[Block]) -> None:
        rows: list[IndexRow] = []
        vectors: list[np.ndarray] = []
        for loaded, embeddings in blocks:
            rows += [_row(record, shard, self.root) for record in loaded]
            vectors += [] if embeddings is None else [embeddings]
        index = self._index
        # A worker that Ray considered dead may have written it.
        if rows and not index.count(f"shard = {shard}"):
            index.add(rows, np.concatenate(vectors), new=True)

    def complete(self) -> None:
        self._index.optimize()

    @property
    def _index(self) -> Index:
        return Index.open(self.uri)


def _row(record: LoadedRecord, shard: int, root: Path | None) -> IndexRow:
    kind: ContentKind = "text"
    width = height = path = None
    if record.image is not None:
        kind = "image" if record.text is None else "both"
        width, height = record.image.size
    if record.path is not None and root is not None:
        path = record.path.relative_to(root).as_posix()
    extra: dict[str, Any] = {"shard": shard}
    if record.generated_caption is not None:
        extra[GENERATED_CAPTION] = record.generated_caption
    return IndexRow(record.id, kind, path, record.text, width=width, height=height, extra=extra)


class EmbeddingTable:
    """Appends rows to a Parquet file; the first block decides the number of dimensions.

    dimensions   if known: then a file without any row is a table as well
    """

    def __init__(
        self, path: Path, columns: tuple[str, ...], model: str, dimensions: int | None = None
    ) -> None:
        self._path = path
        self._columns = columns
        self._model = model
        self._dimensions = dimensions
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with writing(self._path):
            if self._writer is None and self._dimensions is not None and error is None:
                self._writer = pq.ParquetWriter(self._path, self._schema(self._dimensions))
            if self._writer is not None:
                self._writer.close()  # writes the footer

    def append(self, rows: list[LoadedRecord], embeddings: np.ndarray | None) -> None:
        """Write one row group. `embeddings` is float32 [rows, d], None when there are no rows."""
        if embeddings is None:
            return
        flat = np.ascontiguousarray(embeddings, dtype=np.float32).ravel()
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), embeddings.shape[1])
        texts = {
            "id": [row.id for row in rows],
            "text": [row.text for row in rows],
            "path": [None if row.path is None else str(row.path) for row in rows],
            GENERATED_CAPTION: [row.generated_caption for row in rows],
        }
        schema = self._schema(embeddings.shape[1])
        arrays = [pa.array(texts[name], pa.string()) for name in schema.names[:-1]]
        with writing(self._path):
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._path, schema)
            self._writer.write_table(pa.Table.from_arrays([*arrays, vectors], schema=schema))

    def _schema(self, dimensions: int) -> pa.Schema:
        fields = [pa.field(name, pa.string()) for name in ("id", *self._columns)]
        embedding = pa.field("embedding", pa.list_(pa.float32(), dimensions))
        return pa.schema([*fields, embedding], metadata={"cafe.model": self._model})
