"""Embeddings in fewer bits, byte for byte as sentence-transformers' `quantize_embeddings`.

float16          half the bytes, rounded
int8, uint8      each dimension in 256 equal steps between its lowest and its highest value
binary, ubinary  one bit per dimension (is it positive?), eight to a byte; as int8 and as uint8
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Float

EmbeddingPrecision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]

PRECISIONS: tuple[str, ...] = get_args(EmbeddingPrecision)


def value_ranges(embeddings: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "2 d"]:
    """The lowest and the highest value of each dimension, float32.

    Raises:
        ValueError: fewer than two embeddings.
    """
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(
            "the ranges of int8 and uint8 embeddings need at least two embeddings (some hundreds "
            "are better): pass ranges=value_ranges(…) of a representative set"
        )
    return np.stack([embeddings.min(axis=0), embeddings.max(axis=0)]).astype(np.float32)


def quantized(
    embeddings: Float[np.ndarray, "*n d"],
    precision: EmbeddingPrecision,
    ranges: Float[np.ndarray, "2 d"] | None = None,
) -> np.ndarray:
    """Convert embeddings to another precision.

    Args:
        embeddings: float32, [n, d] or [d].
        precision: of the result.
        ranges: lowest and highest value of each dimension, for int8 and uint8; values beyond are
            clipped. None: those of `embeddings`. Embeddings are comparable only if their ranges
            are the same.

    Returns:
        [n, d] or [d]; binary ones have ceil(d / 8) columns.

    Raises:
        ValueError: an unknown precision, ranges of another width, or no ranges for fewer than two
            embeddings.
    """
    match precision:
        case "float32" | "float16":
            return embeddings.astype(precision, copy=False)
        case "int8" | "uint8":
            levels = _levels(embeddings, ranges)
            return (
                (levels - 128).astype(np.int8) if precision == "int8" else levels.astype(np.uint8)
            )
        case "binary" | "ubinary":
            bits = np.packbits(embeddings > 0, axis=-1)
            return (bits.astype(np.int16) - 128).astype(np.int8) if precision == "binary" else bits
    raise ValueError(f"precision {precision!r}: use one of {', '.join(PRECISIONS)}")


def _levels(embeddings: np.ndarray, ranges: np.ndarray | None) -> np.ndarray:
    """Whole numbers from 0 to 255, as floats."""
    if ranges is None:
        if len(embeddings) == 0:
            return embeddings
        ranges = value_ranges(embeddings)
    if ranges.shape != (2, embeddings.shape[-1]):
        raise ValueError(
            f"ranges of shape {ranges.shape}: embeddings of {embeddings.shape[-1]} dimensions need "
            f"(2, {embeddings.shape[-1]})"
        )
    low, high = ranges.astype(np.float32)
    step = (high - low) / 255
    return np.clip(np.floor((embeddings - low) / np.where(step == 0, 1, step)), 0, 255)
