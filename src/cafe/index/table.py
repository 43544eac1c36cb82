"""One index: a LanceDB table of rows with vectors, and what is known about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cafe.errors import DataError
from cafe.index.ann import (
    NEIGHBOURS,
    SAMPLED_QUERIES,
    Approximate,
    index_config,
    nearest,
    partitions_for,
    tuned,
)
from cafe.index.fingerprint import ModelFacts
from cafe.index.rows import (
    HIDDEN,
    VECTOR,
    Known,
    Origin,
    Row,
    Stored,
    schema_of,
    to_table,
    unit,
    vectors_of,
)
from cafe.index.store import TABLE, clauses, connect, is_local, reason, told
from cafe.types import Hit

APPROXIMATE_ROWS = 50_000
"""From so many rows on, an approximate index is worth its error."""

Encode = Callable[[Sequence[Any]], np.ndarray]
"""Inputs, as `CAFe.encode` takes them -> float32 [n, d]."""

_ROWS_AT_ONCE = 8192
_KEEP_VERSIONS = timedelta(minutes=10)
_ORIGIN, _APPROXIMATE = "cafe.origin", "cafe.approximate"


class Index:
    """Rows with vectors of one model, by id.

    `uri` is a folder or what LanceDB takes for an object store ("s3://bucket/photos.index").
    Errors are DataError, naming the index; CafeError where LanceDB is not installed.
    """

    def __init__(self, uri: str, table: Any, encode: Encode | None = None) -> None:
        """Use `open` or `create`."""
        self.uri = uri
        self._table = table
        self._encode = encode

    @classmethod
    def open(
        cls, uri: str | Path, *, model: ModelFacts | None = None, encode: Encode | None = None
    ) -> Index:
        """The index at `uri`.

        model    who will make the queries: DataError when the index was made by another model
        encode   makes queries of `search` that are no vectors into vectors
        Raises DataError when there is no index.
        """
        index = cls.find(uri)
        if index is None:
            raise DataError(
                f"index {uri}: there is none; make one: cafe index MODEL FOLDER --to {uri}"
            )
        index._encode = encode
        if model is not None:
            index.check_model(model)
        return index

    @classmethod
    def find(cls, uri: str | Path) -> Index | None:
        """The index at `uri`, or None where there is none."""
        name = str(uri)
        if is_local(name) and not Path(name).is_dir():
            return None
        database = connect(name)
        try:
            table = database.open_table(TABLE)
        except (ValueError, FileNotFoundError) as error:
            if "not found" in str(error):
                return None
            raise DataError(f"index {name}: cannot be opened ({reason(error)})") from error
        return cls(name, table)

    @classmethod
    def create(
        cls,
        uri: str | Path,
        model: ModelFacts,
        *,
        origin: Origin | None = None,
        columns: Mapping[str, pa.DataType] | None = None,
        encode: Encode | None = None,
    ) -> Index:
        """A new, empty index for vectors of `model`. Raises DataError when there is one.

        columns   of the data, besides an index's own (`cafe.index.rows`)
        """
        name = str(uri)
        database = connect(name)
        notes = {} if origin is None else {_ORIGIN: json.dumps(asdict(origin))}
        schema = schema_of(model.dimension, columns or {}, model.to_json(), notes)
        with told(name):
            return cls(name, database.create_table(TABLE, schema=schema), encode)

    # ------------------------------------------------------------------ what is known

    def __len__(self) -> int:
        return int(self._table.count_rows())

    @property
    def model(self) -> ModelFacts:
        """Who made the vectors."""
        facts = (self._table.schema.metadata or {}).get(b"cafe.model")
        if facts is None:
            raise DataError(f"index {self.uri}: was not made by cafe; make one: cafe index")
        return ModelFacts.from_json(facts.decode())

    @property
    def columns(self) -> dict[str, str]:
        """Column -> Arrow type, for SQL; without the vector and what is only for `sync`."""
        return {f.name: str(f.type) for f in self._table.schema if f.name not in HIDDEN - {"id"}}

    @property
    def origin(self) -> Origin | None:
        text = self._note(_ORIGIN)
        return None if text is None else Origin(**json.loads(text))

    def set_origin(self, origin: Origin) -> None:
        self._take_note(_ORIGIN, json.dumps(asdict(origin)))

    @property
    def approximate(self) -> Approximate | None:
        """How a search is approximated, and its measured recall; None: every search is exact."""
        text = self._note(_APPROXIMATE)
        return None if not text else Approximate.from_json(text)

    def check_model(self, model: ModelFacts) -> None:
        """Raises DataError when vectors of `model` cannot be compared with those in here."""
        own = self.model
        difference = own.difference(model)
        if difference is not None:
            origin = self.origin
            raise DataError(
                f"index {self.uri} holds vectors of model {own.name!r}, and {model.name!r} has "
                f"{difference}; use {own.name}, or index again: "
                f"cafe index {model.name} {origin.source if origin else 'FOLDER'} --to NEW_DIR"
            )

    def known(self) -> dict[str, Known]:
        """Of every row, what tells whether it is still right. An id that is there twice is not."""
        with told(self.uri):
            table = self._table.search().select(["id", *Known._fields]).to_arrow()
        found: dict[str, Known] = {}
        twice: set[str] = set()
        for id, *fields in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if id in found:
                twice.add(id)
            found[id] = Known(*fields)
        if twice:  # two writers at once, in an object store: neither is trusted
            self.delete(twice)
        return {id: known for id, known in found.items() if id not in twice}

    def stored(self, ids: Iterable[str]) -> dict[str, Stored]:
        """The vectors of those of `ids` that are there."""
        found: dict[str, Stored] = {}
        for clause in clauses(ids):
            with told(self.uri):
                table = (
                    self._table.search()
                    .where(clause)
                    .select(["id", "hash", VECTOR, "width", "height"])
                    .to_arrow()
                )
            for row, vector in zip(
                table.drop_columns([VECTOR]).to_pylist(), vectors_of(table), strict=True
            ):
                found[row["id"]] = Stored(row["hash"], vector, row["width"], row["height"])
        return found

    def values(self, column: str) -> set[Any]:
        """The different values of a column, null left out."""
        with told(self.uri):
            table = self._table.search().select([column]).to_arrow()
        return {value for value in table[column].unique().to_pylist() if value is not None}

    # ------------------------------------------------------------------ changes

    def add_columns(self, types: Mapping[str, pa.DataType]) -> None:
        """Make room for columns of the data; rows that are there get null."""
        there = {name.lower() for name in self._table.schema.names}
        new = [pa.field(name, type) for name, type in types.items() if name.lower() not in there]
        if new:
            with told(self.uri):
                self._table.add_columns(new)

    def add(self, rows: Sequence[Row], vectors: np.ndarray, *, new: bool = False) -> None:
        """Write rows with their vectors float [n, d]: all of them or, on an error, none.

        A row whose id is there replaces it.

        new   none of the ids is there: they are appended without looking
        Raises DataError for vectors of another shape, not finite, or zero, and for an id that
        comes twice.
        """
        if not rows:
            return
        if len({row.id for row in rows}) < len(rows):
            raise DataError(f"index {self.uri}: an id comes twice among the rows to add")
        table = to_table(rows, self._unit(vectors, [row.id for row in rows]), self._table.schema)
        with told(self.uri):
            if new:
                self._table.add(table)
            else:
                merge = self._table.merge_insert("id")
                merge.when_matched_update_all().when_not_matched_insert_all().execute(table)

    def delete(self, ids: Iterable[str]) -> None:
        for clause in clauses(ids):
            with told(self.uri):
                self._table.delete(clause)

    def compact(self) -> None:
        """Join small files, forget old versions, take new rows into the approximate index."""
        with told(self.uri):
            self._table.optimize(cleanup_older_than=_KEEP_VERSIONS)

    def optimize(
        self, queries: np.ndarray | None = None, *, threshold: int = APPROXIMATE_ROWS
    ) -> Approximate | None:
        """Compact; from `threshold` rows on, build or extend the approximate index and measure it.

        queries   float [n, d]: what people will ask, for the measurement; None: stored vectors,
                  each without itself among its neighbours
        Partitions are learnt anew when the table has doubled. Returns what was measured (its
        recall may be below `cafe.index.GOAL`), None when searches are exact.
        """
        rows, before = len(self), self.approximate
        built = any(VECTOR in index.columns for index in self._table.list_indices())
        if rows < threshold:
            if built:
                with told(self.uri):
                    self._table.drop_index(f"{VECTOR}_idx")
            self._take_note(_APPROXIMATE, "")
            self.compact()
            return None
        if before is None or not built or rows > 2 * before.rows:
            before = Approximate(partitions_for(rows), rows)
            self._take_note(_APPROXIMATE, "")  # searches are exact until it is measured
            with told(self.uri):
                self._table.create_index(
                    VECTOR, config=index_config(before.partitions), replace=True
                )
        self.compact()
        if queries is None:
            asked, own = self._sampled()
        else:
            asked, own = queries, [None] * len(queries)
        exact = nearest(self._blocks(), asked.astype(np.float32), NEIGHBOURS + 1)
        after = tuned(
            before,
            self._neighbours,
            list(zip(asked, own, strict=True)),
            [_without(ids, one) for ids, one in zip(exact, own, strict=True)],
        )
        self._take_note(_APPROXIMATE, after.to_json())
        return after

    # ------------------------------------------------------------------ search

    def search(
        self, query: Any, top: int = 10, where: str | None = None, *, exact: bool = False
    ) -> list[Hit]:
        """The `top` nearest rows by cosine, the nearest first.

        query   a vector float [d]; or, if the index was opened with `encode`, what that takes
        where   SQL over `columns`: "width > 640 AND text LIKE '%cat%'"
        exact   do not use the approximate index
        Where the SQL leaves fewer rows than an approximate index is worth, the search is exact.
        Raises DataError for a query of another dimension and for SQL that cannot be used.
        """
        vector = self._query(query)
        count = None if where is None else self.count(where)
        settings = None if exact else self.approximate
        if count is not None and count < APPROXIMATE_ROWS:
            settings = None
        return self._nearest(vector, top, where, settings)

    def count(self, where: str) -> int:
        """How many rows fit `where`. Raises DataError when it is not SQL over `columns`."""
        try:
            return int(self._table.count_rows(where))
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            raise DataError(
                f"--where {where!r} cannot be used ({reason(error).split('. Valid fields')[0]}); "
                f"write SQL over the columns {', '.join(self.columns)}"
            ) from error

    def _nearest(
        self, vector: np.ndarray, top: int, where: str | None, settings: Approximate | None
    ) -> list[Hit]:
        shown = [name for name in self._table.schema.names if name not in HIDDEN]
        with told(self.uri):
            search = self._table.search(vector, vector_column_name=VECTOR)
            search = search.distance_type("cosine").limit(top)
            search = search.select(["id", *shown, "_distance"])
            if where is not None:
                search = search.where(where, prefilter=True)
            if settings is None:
                search = search.bypass_vector_index()
            else:
                # With SQL the fitting rows may lie elsewhere: look on until there are enough.
                search = search.minimum_nprobes(settings.probes)
                search = search.maximum_nprobes(settings.probes if where is None else 0)
                search = search.refine_factor(settings.refine)
            found = search.to_list()
        return [
            Hit(
                row["id"],
                1.0 - float(row["_distance"]),
                {name: row[name] for name in shown if row[name] is not None},
            )
            for row in found
        ]

    # ------------------------------------------------------------------ pieces

    def _query(self, query: Any) -> np.ndarray:
        if not isinstance(query, np.ndarray):
            if self._encode is None:
                raise DataError(
                    f"index {self.uri}: a query of type {type(query).__name__} needs a model; "
                    "give a vector, or open the index with encode="
                )
            query = self._encode([query])[0]
        if query.ndim != 1:
            raise DataError(f"index {self.uri}: a query has shape {query.shape}; search one vector")
        return self._unit(query[None], ["the query"])[0]

    def _unit(self, vectors: np.ndarray, names: Sequence[str]) -> np.ndarray:
        return unit(vectors, names, self._table.schema.field(VECTOR).type.list_size)

    def _sampled(self) -> tuple[np.ndarray, list[str | None]]:
        """Stored vectors, spread over the table, and their ids."""
        rows = len(self)
        chosen = np.random.default_rng(0).choice(rows, min(SAMPLED_QUERIES, rows), replace=False)
        with told(self.uri):
            take = self._table.take_offsets(sorted(chosen.tolist())).select(["id", VECTOR])
            table = take.to_arrow()
        return vectors_of(table), table["id"].to_pylist()

    def _blocks(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """Ids and vectors of the whole table."""
        with told(self.uri):
            for batch in self._table.search().select(["id", VECTOR]).to_batches(_ROWS_AT_ONCE):
                if len(batch):
                    table = pa.Table.from_batches([batch])
                    yield table["id"].to_pylist(), vectors_of(table)

    def _neighbours(self, query: tuple[np.ndarray, str | None], settings: Approximate) -> list[str]:
        vector, own = query
        found = self._nearest(vector, NEIGHBOURS + (own is not None), None, settings)
        return _without([hit.id for hit in found], own)

    def _note(self, name: str) -> str | None:
        notes = self._table.schema.field(VECTOR).metadata or {}
        text = notes.get(name.encode())
        return None if text is None else text.decode()

    def _take_note(self, name: str, text: str) -> None:
        """Keep a text with the table, if it is not there: LanceDB lets a field's notes change."""
        if (self._note(name) or "") != text:
            with told(self.uri):
                self._table.update_field_metadata({"path": VECTOR, "metadata": {name: text}})


def _without(ids: Sequence[str], own: str | None) -> list[str]:
    """A stored vector is no neighbour of itself."""
    return [id for id in ids if id != own][:NEIGHBOURS]
