"""The Arrow columns of an index.

id       string   path inside the folder, or the id of the record
kind     string   image, text, or both
path     string   of the image file, relative to the folder that the index is of
text     string   the text itself, an image's caption, or what a document stores for its page
hash     string   blake2b of the file's bytes (of a text: of its UTF-8)
record   string   blake2b of everything else: text, path, other columns
width    int32    of the image, in pixels, after its EXIF rotation
height   int32
vector   float32 [dimension], of length one
tokens   list<float32 [dim]>  vectors of its tokens; only in an index made with them
generated_caption  string  what a model wrote of the image, as a caption or a thought; only in an
         index made with them
page     int64    number of a document's page, from 1; only in an index with documents
…        the other columns of the data: bool, int64, double or string
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from cafe.errors import DataError
from cafe.index.fingerprint import ModelFacts
from cafe.index.tokens import TOKENS, token_array, token_type
from cafe.types import Hit

ContentKind = Literal["image", "text", "both"]

VECTOR = "vector"
GENERATED_CAPTION = "generated_caption"
HIDDEN = frozenset({"id", "hash", "record", VECTOR, TOKENS})
"""Columns that are not part of a hit's metadata."""

_OWN = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("kind", pa.string()),
    pa.field("path", pa.string()),
    pa.field("text", pa.string()),
    pa.field("hash", pa.string()),
    pa.field("record", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
)
_RESERVED = frozenset({*(f.name for f in _OWN), VECTOR, TOKENS})
_TYPES = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One row of an index. `extra` holds the other columns of the data, by name."""

    id: str
    kind: ContentKind
    path: str | None = None
    text: str | None = None
    hash: str = ""
    record: str = ""
    width: int | None = None
    height: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class RowState(NamedTuple):
    """What shows whether a row is still equal to what its item would become."""

    kind: str
    hash: str
    record: str


class StoredVector(NamedTuple):
    """A row's vector, float32 [d], and the hash and size of the content it was made from.

    Also what only some indexes have: the caption, and the tokens' vectors, float32 [n, dim].
    """

    hash: str
    vector: np.ndarray
    width: int | None
    height: int | None
    generated_caption: str | None = None
    tokens: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """What an index was made from.

    source   the folder or file, absolute, or the name of a data set
    root     where the rows' paths start; None: they have none
    made_by  which verb fills it: an index that `cafe embed` wrote is not kept equal to a folder
    page_pixels  size of the images of documents' pages, at most; None: it has no pages
    """

    source: str
    root: str | None = None
    made_by: Literal["index", "embed"] = "index"
    page_pixels: int | None = None

    def to_json(self) -> str:
        """What earlier versions wrote, and the size of pages where there are pages."""
        facts = asdict(self)
        if self.page_pixels is None:
            del facts["page_pixels"]
        return json.dumps(facts)

    @classmethod
    def from_json(cls, text: str) -> Origin:
        return cls(**json.loads(text))


def schema_of(
    model: ModelFacts, extra: Mapping[str, pa.DataType], notes: Mapping[str, str]
) -> pa.Schema:
    """Columns of a new index; `notes` is metadata of the vector column."""
    vectors = [pa.field(VECTOR, pa.list_(pa.float32(), model.dimension), metadata=dict(notes))]
    if model.token_dimension is not None:
        vectors.append(pa.field(TOKENS, token_type(model.token_dimension)))
    others = [pa.field(name, type) for name, type in extra.items()]
    return pa.schema([*_OWN, *vectors, *others], metadata={"cafe.model": model.to_json()})


def column_name(name: str) -> str:
    """The name of a data column in an index: letters that SQL allows, none of our own names."""
    name = re.sub(r"\W", "_", name)
    taken = name.lower() in _RESERVED or name.startswith("_")
    return f"{name.strip('_')}_" if taken else name


def plain(value: Any) -> Any:
    """A value as a column holds it: anything but a number, boolean or string becomes JSON.

    NaN and infinity become null: hits are serialised as JSON, which has neither.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def column_types(extras: Iterable[Mapping[str, Any]]) -> dict[str, pa.DataType]:
    """Column -> type that holds all of its values: double for integers with floats, else string."""
    found: dict[str, set[type]] = {}
    for extra in extras:
        for name, value in extra.items():
            if value is not None:
                found.setdefault(name, set()).add(type(value))
    return {name: _common(types) for name, types in found.items()}


def _common(types: set[type]) -> pa.DataType:
    if len(types) == 1:
        return _TYPES.get(next(iter(types)), pa.string())
    return pa.float64() if types == {int, float} else pa.string()


def to_table(
    rows: Sequence[IndexRow],
    vectors: np.ndarray,
    schema: pa.Schema,
    tokens: Sequence[np.ndarray] | None = None,
) -> pa.Table:
    """Rows, their vectors [n, d] and those of their tokens in the columns of `schema`.

    Raises:
        DataError: a column cannot hold a value; the message names column and id.
    """
    columns: list[pa.Array] = []
    for column in schema:
        if column.name == VECTOR:
            flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
            columns.append(pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
        elif column.name == TOKENS:
            columns.append(token_array(tokens, [row.id for row in rows], column.type))
        elif column.name in _RESERVED:
            columns.append(pa.array([getattr(row, column.name) for row in rows], column.type))
        else:
            columns.append(_extra(rows, column))
    fields = [pa.field(f.name, f.type, f.nullable) for f in schema]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def _extra(rows: Sequence[IndexRow], column: pa.Field) -> pa.Array:
    values = [_fitting(row.extra.get(column.name), column.type) for row in rows]
    try:
        return pa.array(values, column.type)
    except (pa.ArrowException, OverflowError):
        for row, value in zip(rows, values, strict=True):
            try:
                pa.array([value], column.type)
            except (pa.ArrowException, OverflowError) as error:
                raise DataError(
                    f"{row.id}: {column.name} is {value!r}, and this index holds {column.type} "
                    "there; fix the data, or index it into a new directory"
                ) from error
        raise


def _fitting(value: Any, type: pa.DataType) -> Any:
    """Text columns hold anything; number columns refuse booleans, which would become 0 and 1."""
    if value is None or not pa.types.is_string(type):
        is_number = pa.types.is_integer(type) or pa.types.is_floating(type)
        return str(value).lower() if isinstance(value, bool) and is_number else value
    return value if isinstance(value, str) else json.dumps(value)


def hits_of(rows: Sequence[dict[str, Any]], shown: Sequence[str], asked: int) -> list[Hit]:
    """What a search returned; `asked` is the number of vectors that were searched for."""
    return [hit_of(row, 1.0 - float(row["_distance"]) / asked, shown) for row in rows]


def hit_of(row: dict[str, Any], score: float, shown: Sequence[str]) -> Hit:
    """A row of a search; its metadata are the `shown` columns that have a value."""
    return Hit(row["id"], score, {name: row[name] for name in shown if row[name] is not None})


def vectors_of(table: pa.Table) -> np.ndarray:
    """The vector column of a table, float32 [n, d]."""
    column = table[VECTOR].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def stored_in(table: pa.Table) -> dict[str, StoredVector]:
    """By id, of a table with the columns of `StoredVector`."""
    found = {}
    others = table.drop_columns([VECTOR]).to_pylist()
    for row, vector in zip(others, vectors_of(table), strict=True):
        id, tokens = row.pop("id"), row.pop(TOKENS, None)
        tokens = None if tokens is None else np.array(tokens, dtype=np.float32)
        found[id] = StoredVector(vector=vector, tokens=tokens, **row)
    return found


def unit(vectors: np.ndarray, names: Sequence[str], dimension: int) -> np.ndarray:
    """Normalise vectors to length one.

    Args:
        vectors: [n, d], one for each of `names`.
        names: n names, for errors.
        dimension: the d that is expected.

    Returns:
        float32 [n, d].

    Raises:
        DataError: another shape, or a vector that is zero or not finite.
    """
    if vectors.shape != (len(names), dimension):
        raise DataError(
            f"vectors have shape {tuple(vectors.shape)}, expected ({len(names)}, {dimension}); "
            "use the model that made the index"
        )
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        raise DataError(
            f"the embedding of {names[bad[0]]} is zero or not finite; the model is broken"
        )
    return (vectors / lengths).astype(np.float32)
