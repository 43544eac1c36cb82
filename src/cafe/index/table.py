"""One index: a LanceDB table of rows with vectors, and what is known about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cafe.errors import DataError
from cafe.index import full_text, store
from cafe.index.ann import (
    NEIGHBOURS,
    SAMPLED_QUERIES,
    Approximate,
    index_config,
    nearest,
    partitions_for,
    tuned,
    with_settings,
    without,
)
from cafe.index.condition import checked, unusable
from cafe.index.fingerprint import ModelFacts
from cafe.index.rows import (
    HIDDEN,
    VECTOR,
    IndexRow,
    Origin,
    RowState,
    StoredVector,
    hits_of,
    schema_of,
    stored_in,
    to_table,
    unit,
)
from cafe.index.store import TABLE, clauses, connect, is_local, lance_errors, reason
from cafe.index.tokens import TOKENS, check_tokens, token_dimension
from cafe.types import Hit

APPROXIMATE_ROWS = 50_000
"""Number of rows from which on an approximate index is worth its error."""

EncodeItems = Callable[[Sequence[Any]], np.ndarray]
"""Inputs, as `CAFe.encode` takes them -> float32 [n, d]."""

_KEEP_VERSIONS = timedelta(minutes=10)
_ORIGIN, _APPROXIMATE = "cafe.origin", "cafe.approximate"


class Index:
    """Rows with vectors of one model, by id.

    `uri` is a folder, or an object store's URI as LanceDB takes it ("s3://bucket/photos.index").
    All errors are DataErrors that name the index, or a CafeError where LanceDB is not installed.
    """

    def __init__(self, uri: str, table: Any, encode: EncodeItems | None = None) -> None:
        """Use `open` or `create`."""
        self.uri = uri
        self._table = table
        self._encode = encode

    @classmethod
    def open(
        cls, uri: str | Path, *, model: ModelFacts | None = None, encode: EncodeItems | None = None
    ) -> Index:
        """Open the index at `uri`.

        Args:
            uri: a folder, or an object store's URI.
            model: the model that will make the queries.
            encode: embeds queries of `search` that are not vectors.

        Raises:
            DataError: there is no index, or it was made by a model other than `model`.
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
            with lance_errors(name):
                return cls(name, database.open_table(TABLE))
        except DataError as error:
            if "not found" in str(error.__cause__):
                return None
            raise

    @classmethod
    def create(
        cls,
        uri: str | Path,
        model: ModelFacts,
        *,
        origin: Origin | None = None,
        columns: Mapping[str, pa.DataType] | None = None,
        encode: EncodeItems | None = None,
    ) -> Index:
        """Create an empty index for vectors of `model`.

        Args:
            uri: a folder, or an object store's URI.
            model: `cafe.retrieval.indexing.model_facts(model)`.
            origin: what the index will be made from.
            columns: columns of the data, besides an index's own (`cafe.index.rows`).
            encode: embeds queries of `search` that are not vectors.

        Raises:
            DataError: there is an index already.
        """
        name = str(uri)
        database = connect(name)
        notes = {} if origin is None else {_ORIGIN: origin.to_json()}
        schema = schema_of(model, columns or {}, notes)
        with lance_errors(name):
            return cls(name, database.create_table(TABLE, schema=schema), encode)

    # ------------------------------------------------------------------ state

    def __len__(self) -> int:
        return int(self._table.count_rows())

    @property
    def model(self) -> ModelFacts:
        """The model that made the vectors."""
        facts = (self._table.schema.metadata or {}).get(b"cafe.model")
        if facts is None:
            raise DataError(f"index {self.uri}: was not made by cafe; make one: cafe index")
        return ModelFacts.from_json(facts.decode())

    @property
    def columns(self) -> dict[str, str]:
        """Column -> Arrow type, for SQL; without the vector and what only `sync` uses."""
        return {f.name: str(f.type) for f in self._table.schema if f.name not in HIDDEN - {"id"}}

    @property
    def origin(self) -> Origin | None:
        text = self._note(_ORIGIN)
        return None if text is None else Origin.from_json(text)

    def set_origin(self, origin: Origin) -> None:
        self._set_note(_ORIGIN, origin.to_json())

    @property
    def approximate(self) -> Approximate | None:
        """Settings and measured recall of approximate searches; None: every search is exact."""
        text = self._note(_APPROXIMATE)
        return None if not text else Approximate.from_json(text)

    def check_model(self, model: ModelFacts) -> None:
        """Raises DataError when vectors of `model` cannot be compared with those of the index."""
        own = self.model
        if (difference := own.difference(model)) is not None:
            origin = self.origin
            raise DataError(
                f"index {self.uri} holds vectors of model {own.name!r}, and {model.name!r} has "
                f"{difference}; use {own.name}, or index again: "
                f"cafe index {model.name} {origin.source if origin else 'FOLDER'} --to NEW_DIR"
            )

    def known(self) -> dict[str, RowState]:
        """Id -> state of its row. Rows whose id is there twice are deleted: neither is trusted."""
        with lance_errors(self.uri):
            table = self._table.search().select(["id", *RowState._fields]).to_arrow()
        states: dict[str, RowState] = {}
        twice: set[str] = set()
        for id, *fields in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if id in states:
                twice.add(id)
            states[id] = RowState(*fields)
        if twice:  # two concurrent writers, in an object store
            self.delete(twice)
        return {id: state for id, state in states.items() if id not in twice}

    def stored(self, ids: Iterable[str]) -> dict[str, StoredVector]:
        """The vectors of the rows with these ids; missing ids are left out."""
        vectors: dict[str, StoredVector] = {}
        columns = ["id", *(f for f in StoredVector._fields if f in self._table.schema.names)]
        with lance_errors(self.uri):
            for clause in clauses(ids):
                vectors |= stored_in(self._table.search().where(clause).select(columns).to_arrow())
        return vectors

    def values(self, column: str) -> set[Any]:
        """The distinct values of a column, without null."""
        with lance_errors(self.uri):
            table = self._table.search().select([column]).to_arrow()
        return {value for value in table[column].unique().to_pylist() if value is not None}

    # ------------------------------------------------------------------ changes

    def add_columns(self, types: Mapping[str, pa.DataType]) -> None:
        """Add columns of the data; existing rows get null."""
        existing = {name.lower() for name in self._table.schema.names}
        new = [pa.field(name, type) for name, type in types.items() if name.lower() not in existing]
        with lance_errors(self.uri):
            if new:
                self._table.add_columns(new)

    def add(
        self,
        rows: Sequence[IndexRow],
        vectors: np.ndarray,
        *,
        new: bool = False,
        tokens: Sequence[np.ndarray] | None = None,
    ) -> None:
        """Write rows with their vectors: all of them or, on an error, none.

        Args:
            rows: a row whose id exists replaces the old one.
            vectors: float [n, d], of any length but zero.
            new: none of the ids exists: rows are appended without a lookup.
            tokens: unit vectors [n, dim] of each row's tokens, if the index was made with them.

        Raises:
            DataError: vectors of another shape, not finite or zero, or an id that occurs twice.
        """
        if not rows:
            return
        if len({*(names := [row.id for row in rows])}) < len(names):
            raise DataError(f"index {self.uri}: an id occurs twice among the rows to add")
        table = to_table(rows, self._unit(vectors, names), self._table.schema, tokens)
        with lance_errors(self.uri):
            if new:
                self._table.add(table)
            else:
                merge = self._table.merge_insert("id")
                merge.when_matched_update_all().when_not_matched_insert_all().execute(table)

    def delete(self, ids: Iterable[str]) -> None:
        with lance_errors(self.uri):
            for clause in clauses(ids):
                self._table.delete(clause)

    def compact(self) -> None:
        """Merge small files, drop old versions, and add new rows to the approximate index."""
        with lance_errors(self.uri):
            self._table.optimize(cleanup_older_than=_KEEP_VERSIONS)

    def optimize(
        self, queries: np.ndarray | None = None, *, threshold: int = APPROXIMATE_ROWS
    ) -> Approximate | None:
        """Compact, index texts, and from `threshold` rows on measure an approximate index.

        Args:
            queries: float [n, d], like those that people will ask, for the measurement; None: a
                sample of the stored vectors, each without itself among its neighbours.
            threshold: number of rows from which on search is approximate. Partitions are trained
                again when the table has doubled.

        Returns:
            The settings with their measured recall, which may be below `cafe.index.GOAL`; None
            when searches are exact.
        """
        full_text.build(self._table, self.uri)
        rows, before = len(self), self.approximate
        built = any(VECTOR in index.columns for index in self._table.list_indices())
        if rows < threshold:
            if built:
                with lance_errors(self.uri):
                    self._table.drop_index(f"{VECTOR}_idx")
            self._set_note(_APPROXIMATE, "")
            self.compact()
            return None
        if before is None or not built or rows > 2 * before.rows:
            before = Approximate(partitions_for(rows), rows)
            self._set_note(_APPROXIMATE, "")  # searches are exact until it is measured
            with lance_errors(self.uri):
                self._table.create_index(
                    VECTOR, config=index_config(before.partitions), replace=True
                )
        self.compact()
        own: list[str | None] = [] if queries is None else [None] * len(queries)
        if queries is None:
            queries, own = store.sampled(self._table, self.uri, SAMPLED_QUERIES)
        every = store.blocks(self._table, self.uri)
        found = nearest(every, queries.astype(np.float32), NEIGHBOURS + 1)
        exact = [without(ids, one) for ids, one in zip(found, own, strict=True)]
        after = tuned(before, self._neighbours, list(zip(queries, own, strict=True)), exact)
        self._set_note(_APPROXIMATE, after.to_json())
        return after

    # ------------------------------------------------------------------ search

    def search(
        self,
        query: Any,
        top: int = 10,
        where: str | None = None,
        *,
        exact: bool = False,
        words: str | None = None,
    ) -> list[Hit]:
        """Find the `top` nearest rows by cosine, the nearest first.

        Args:
            query: a vector, float [d]; unit vectors of tokens, [n, dim], if the index has such
                (`cafe.index.tokens`); or, if it was opened with `encode`, what that takes.
            top: number of hits, 1 or more.
            where: as `cafe.index.condition.checked` takes it: "width > 640 AND text LIKE '%cat%'".
                Where it leaves too few rows for an approximate index to pay, the search is exact.
            exact: do not use the approximate index.
            words: order by these words in the texts of the rows as well (`cafe.index.full_text`):
                both orders, fused by their ranks. A hit's score is its cosine in any case.

        Raises:
            DataError: a query of another dimension, a `where` that cannot be used, or words where
                the index has no texts.
        """
        store.check_top(top)
        vector, count = self._query(query), None if where is None else self.count(where)
        exact = exact or vector.ndim == 2 or (count is not None and count < APPROXIMATE_ROWS)
        condition = None if where is None else checked(where, self.columns)
        settings = None if exact else self.approximate
        if words is None:
            return self._nearest(vector, top, condition, settings)
        many, shown = max(top, full_text.CANDIDATES), self._shown
        found = full_text.matching(self._table, self.uri, words, vector, many, condition, shown)
        return full_text.fused(self._nearest(vector, many, condition, settings), found, top)

    def check_words(self) -> None:
        """Raises NoTextsError where the index has no texts that can be searched by words."""
        full_text.searchable_columns(self._table, self.uri)

    def count(self, where: str) -> int:
        """Number of rows that match `where`. Raises DataError for one that cannot be used."""
        condition = checked(where, self.columns)
        try:
            return int(self._table.count_rows(condition))
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            why = reason(error).split(". Valid fields")[0]
            raise unusable(where, why, self.columns) from error

    def _nearest(
        self, vector: np.ndarray, top: int, where: str | None, settings: Approximate | None
    ) -> list[Hit]:
        shown, column = self._shown, VECTOR if vector.ndim == 1 else TOKENS
        with lance_errors(self.uri):
            search = self._table.search(vector, vector_column_name=column).distance_type("cosine")
            search = search.limit(top).select(["id", *shown, "_distance"])
            if where is not None:
                search = search.where(where, prefilter=True)
            rows = with_settings(search, settings, where).to_list()
        return hits_of(rows, shown, len(np.atleast_2d(vector)))

    @property
    def _shown(self) -> list[str]:
        """The columns of a hit's metadata."""
        return [name for name in self._table.schema.names if name not in HIDDEN]

    def _query(self, query: Any) -> np.ndarray:
        if not isinstance(query, np.ndarray):
            if self._encode is None:
                raise DataError(
                    f"index {self.uri}: a query of type {type(query).__name__} needs a model; "
                    "give a vector, or open the index with encode="
                )
            query = self._encode([query])[0]
        if query.ndim == 1:
            return self._unit(query[None], ["the query"])[0]
        return check_tokens(query, "the query", token_dimension(self._table.schema))

    def _unit(self, vectors: np.ndarray, names: Sequence[str]) -> np.ndarray:
        return unit(vectors, names, self._table.schema.field(VECTOR).type.list_size)

    def _neighbours(self, query: tuple[np.ndarray, str | None], settings: Approximate) -> list[str]:
        vector, own = query
        hits = self._nearest(vector, NEIGHBOURS + (own is not None), None, settings)
        return without([hit.id for hit in hits], own)

    def _note(self, name: str) -> str | None:
        notes = self._table.schema.field(VECTOR).metadata or {}
        return notes[name.encode()].decode() if name.encode() in notes else None

    def _set_note(self, name: str, text: str) -> None:
        """Store a text with the table if it differs: LanceDB lets a field's metadata change."""
        if (self._note(name) or "") != text:
            with lance_errors(self.uri):
                self._table.update_field_metadata({"path": VECTOR, "metadata": {name: text}})
