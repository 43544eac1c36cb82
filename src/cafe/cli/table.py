"""The Parquet file of `cafe embed`, written block by block.

id: string    text: string, path: string (where the input has them)
embedding: fixed_size_list<float32>[dimensions]
schema metadata "cafe.model": the model that was named
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cafe.cli.files import writing
from cafe.cli.inputs import Loaded


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

    def append(self, rows: list[Loaded], embeddings: np.ndarray | None) -> None:
        """Write one row group. `embeddings` is float32 [rows, d], None when there are no rows."""
        if embeddings is None:
            return
        flat = np.ascontiguousarray(embeddings, dtype=np.float32).ravel()
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), embeddings.shape[1])
        texts = {
            "id": [row.id for row in rows],
            "text": [row.text for row in rows],
            "path": [None if row.path is None else str(row.path) for row in rows],
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
