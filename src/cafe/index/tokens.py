"""The column of token vectors: many vectors of one row, compared by MaxSim.

tokens   list<fixed_size_list<float32, dim>>   unit vectors, at least one; only in an index that was
                                               made with them, beside the row's own vector

LanceDB takes several vectors that are asked of such a column as one query, and its distance is then
the number of these vectors less the sum of each one's largest cosine with a vector of the row. A
hit's score is the mean of these cosines, so that scores of long and short queries compare, and lie
where those of single vectors do. All rows are compared: the search is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from cafe.errors import DataError

TOKENS = "tokens"


def token_type(dimension: int) -> pa.DataType:
    """The column's type, for vectors of a dimension."""
    return pa.list_(pa.list_(pa.float32(), dimension))


def token_dimension(schema: pa.Schema) -> int | None:
    """The dimension of an index's token vectors; None: it has none."""
    found = schema.get_field_index(TOKENS)
    return None if found < 0 else int(schema.field(found).type.value_type.list_size)


def token_array(
    tokens: Sequence[np.ndarray] | None, names: Sequence[str], type: pa.DataType
) -> pa.Array:
    """The values of the column.

    Args:
        tokens: float [n, dim] of each row.
        names: of the rows, for errors.
        type: of the column.

    Raises:
        DataError: there are none, or those of a row have another shape or are not of length one.
    """
    if tokens is None or len(tokens) != len(names):
        raise DataError(
            f"{0 if tokens is None else len(tokens)} rows with token vectors, and {len(names)} "
            "rows to add; this index holds token vectors: give those of every row"
        )
    size = type.value_type.list_size
    flat = np.concatenate([check_tokens(t, n, size) for t, n in zip(tokens, names, strict=True)])
    ends = np.cumsum([0, *(len(own) for own in tokens)]).astype(np.int32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
    return pa.ListArray.from_arrays(pa.array(ends), vectors)


def check_tokens(tokens: np.ndarray, name: str, dimension: int | None) -> np.ndarray:
    """What is stored as token vectors, or searched for, float32 [n, dim].

    Raises:
        DataError: the index has none, they have another shape, or are not of length one.
    """
    if dimension is None:
        raise DataError(
            f"{name} has shape {tokens.shape}, and this index holds one vector of each item; "
            "search one vector, or index again: cafe index --multi-vector"
        )
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] != dimension:
        raise DataError(
            f"the token vectors of {name} have shape {tokens.shape}, expected (n, {dimension}); "
            "use the model that made the index"
        )
    lengths = np.linalg.norm(tokens.astype(np.float64), axis=1)
    if not np.allclose(lengths, 1, atol=1e-2):  # NaN is not close, either; float16 is
        raise DataError(f"the token vectors of {name} are not of length one")
    return tokens.astype(np.float32)
