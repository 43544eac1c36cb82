"""Vectors as they are sent: cut, of length 1, in one of several types of numbers.

int8, uint8      256 equal steps from -4 to 4 standard deviations, 1 / sqrt(dimension) being one of
                 a unit vector's coordinates. The range is the same in every answer, so vectors of
                 different requests are comparable; what is beyond it is clipped
binary, ubinary  one bit for each coordinate (is it positive?), eight to a byte, as int8 and uint8
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from cafe.serving.errors import ApiError
from cafe.serving.schema_vectors import NumberType

DEVIATIONS = 4.0
"""Half the range of int8 and uint8, in standard deviations of a coordinate."""


def checked_width(asked: int | None, dimension: int, param: str = "dimensions") -> int:
    """The number of coordinates to send. Raises ApiError (400) for more than there are."""
    width = dimension if asked is None else asked
    if width > dimension:
        raise ApiError.invalid(f"{param}: the model's embeddings have only {dimension}", param)
    return width


def unit_vectors(vectors: np.ndarray, width: int) -> np.ndarray:
    """The first `width` coordinates of each vector, normalised as in `CAFe.encode`.

    Args:
        vectors: [n, d].
        width: At most d.

    Returns:
        float32 [n, width], each row of length 1.
    """
    truncated = vectors[:, :width]
    return truncated / np.maximum(np.linalg.norm(truncated, axis=1, keepdims=True), 1e-12)


def as_numbers(vectors: np.ndarray, numbers: NumberType) -> np.ndarray:
    """Unit vectors [n, d] as numbers of a type; binary ones have ceil(d / 8) columns."""
    if numbers == "float":
        return vectors.astype("<f4", copy=False)
    # Late: the server listens before torch is imported.
    from cafe.model.quantization import quantized

    width = vectors.shape[1]
    most = DEVIATIONS / np.sqrt(width)
    ranges = np.stack([np.full(width, -most), np.full(width, most)]).astype(np.float32)
    return quantized(vectors, numbers, ranges)


def encoded(vector: np.ndarray, as_base64: bool) -> list[Any] | str:
    """A list of numbers, or base64 of their bytes: little-endian float32, or one byte for each."""
    return base64.b64encode(vector.tobytes()).decode("ascii") if as_base64 else vector.tolist()
