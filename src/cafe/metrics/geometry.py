"""Geometry of the embedding space: the gap between modalities, and the dimensions in use.

Embeddings of any length come in; everything is measured on the unit sphere, in float64 (they are
copied: 8 bytes per coordinate). Shapes: n, m embeddings of two kinds, d coordinates.

Chance levels, for orientation: modality_gap 0, modality_probe_accuracy 0.5 where the two kinds are
distributed alike; effective_rank between 1 (one line) and min(n, d).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cafe.errors import DataError

if TYPE_CHECKING:  # shapes for readers and tests; at run time nothing is imported or checked
    from jaxtyping import Float

__all__ = [
    "alignment",
    "effective_rank",
    "modality_gap",
    "modality_probe_accuracy",
    "project_2d",
    "uniformity",
]

_RIDGE = 1e-3  # of the mean variance: settles directions without data, moves no other


def modality_gap(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Euclidean distance between the centroids of the two kinds, in [0, 2] (arXiv 2203.02053).

    Raises:
        DataError, ValueError: embeddings that are empty, zero, not finite, or of two widths.
    """
    x, y = _units(a, b)
    return float(np.linalg.norm(x.mean(axis=0) - y.mean(axis=0)))


def alignment(query: Float[np.ndarray, "n d"], target: Float[np.ndarray, "n d"]) -> float:
    """Mean squared distance of pairs, in [0, 4]; less is better (Wang & Isola, arXiv 2005.10242).

    Row i of both belong together.

    Raises:
        DataError, ValueError: as in `modality_gap`, or two different numbers of rows.
    """
    x, y = _units(query, target)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} queries and {len(y)} targets; row i of both is one pair")
    return float(np.square(x - y).sum(axis=1).mean())


def uniformity(embeddings: Float[np.ndarray, "n d"], *, block: int = 1024) -> float:
    """The log of the mean of exp(-2 |x_i - x_j|²) over all pairs i < j (Wang & Isola, t = 2).

    0 where all are alike, about -4 + 8/d for n, d large and uniform on the sphere; less is better.
    Time grows with n²; `block` rows of the n x n products exist at a time.

    Raises:
        DataError, ValueError: as in `modality_gap`; fewer than two embeddings, a block below 1.
    """
    (x,) = _units(embeddings)
    n = len(x)
    if n < 2 or block < 1:
        raise ValueError(f"{n} embeddings, block {block}; there must be two, and one")
    total = 0.0
    for start in range(0, n, block):
        cosines = x[start : start + block] @ x[start:].T
        # On the sphere |x - y|² = 2 - 2 cos. The strict upper triangle is each pair once.
        total += float(np.triu(np.exp(4 * (cosines - 1)), k=1).sum())
    return float(np.log(total / (n * (n - 1) / 2)))


def effective_rank(embeddings: Float[np.ndarray, "n d"]) -> float:
    """The number of directions that carry the embeddings (Roy & Vetterli 2007; arXiv 2210.02885).

    exp(-sum p ln p), where p = singular values / their sum, as in RankMe. Not centred: a common
    offset, which a gap between modalities makes, is a direction too.

    Raises:
        DataError, ValueError: as in `modality_gap`.
    """
    (x,) = _units(embeddings)
    values = np.linalg.svd(x, compute_uv=False)
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def modality_probe_accuracy(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], *, seed: int = 0
) -> float:
    """Held-out accuracy of a linear probe that separates the two kinds of embeddings.

    Each kind is split in halves at random. Ridge regression to +1 and -1 is fitted to one half and
    judged on the other, both ways round. The two kinds weigh the same in the fit and in the result,
    whatever their numbers: 0.5 is chance, 1 a gap that a plane can cut.

    Raises:
        DataError, ValueError: as in `modality_gap`, or fewer than two embeddings of a kind.
    """
    x, y = _units(a, b)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"{len(x)} and {len(y)} embeddings; the probe needs two of each kind")
    rng = np.random.default_rng(seed)
    x, y = rng.permutation(x), rng.permutation(y)
    halves = [(x[::2], y[::2]), (x[1::2], y[1::2])]
    accuracies = []
    for fitted, judged in (halves, halves[::-1]):
        weight, bias = _probe(*fitted)
        accuracies += [_share(judged[0] @ weight + bias), _share(-(judged[1] @ weight + bias))]
    return float(np.mean(accuracies))


def project_2d(*groups: Float[np.ndarray, "_ d"]) -> tuple[Float[np.ndarray, "_ 2"], ...]:
    """Project all groups, in input order, on the two principal axes of their union.

    Each axis points to where its largest coordinate is positive, so the map is not mirrored from
    run to run. The union is centred; where it has fewer than two dimensions the rest is 0.

    Raises:
        DataError, ValueError: as in `modality_gap`, or no group.
    """
    if not groups:
        raise ValueError("project_2d needs at least one group of embeddings")
    units = _units(*groups)
    union = np.concatenate(units)
    centre = union.mean(axis=0)
    # R has the axes of the union and at most d rows, so a long union costs no long U.
    triangle = np.linalg.qr(union - centre, mode="r")
    axes = np.linalg.svd(triangle, full_matrices=False)[2][:2]
    largest = np.abs(axes).argmax(axis=1)
    axes = axes * np.where(axes[np.arange(len(axes)), largest] < 0, -1.0, 1.0)[:, None]
    missing = 2 - len(axes)
    return tuple(np.pad((unit - centre) @ axes.T, ((0, 0), (0, missing))) for unit in units)


def _probe(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]
) -> tuple[Float[np.ndarray, " d"], float]:
    """Ridge regression of +1 on x and -1 on y, each kind weighing 1/2: weight and bias.

    Both up to one positive factor, which moves no sign: the scatter between the two means is left
    out of the matrix, because it only shortens the solution (Sherman-Morrison).
    """
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    middle, half = (mean_x + mean_y) / 2, (mean_x - mean_y) / 2
    scatter = np.atleast_2d(np.cov(x.T, bias=True) + np.cov(y.T, bias=True)) / 2
    # Each kind in one point: no scatter to measure a ridge by, and any will do.
    ridge = _RIDGE * np.trace(scatter) / len(scatter) or 1.0
    weight = np.linalg.solve(scatter + ridge * np.eye(len(scatter)), half)
    return weight, -float(weight @ middle)


def _share(margins: Float[np.ndarray, " n"]) -> float:
    """Share of points on the right side; on the plane itself half of them are."""
    return float((margins > 0).mean() + 0.5 * (margins == 0).mean())


def _units(*groups: Float[np.ndarray, "_ d"]) -> tuple[Float[np.ndarray, "_ d"], ...]:
    """Unit-normalised float64 copies, checked."""
    shapes = [group.shape for group in groups]
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or len({s[1] for s in shapes}) > 1:
        raise ValueError(f"embeddings of shapes {shapes} must be [n, d] with one d, none empty")
    units = []
    for number, group in enumerate(groups):
        wide = group.astype(np.float64)
        norms = np.linalg.norm(wide, axis=1, keepdims=True)
        bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
        if bad.size:
            raise DataError(f"embedding {bad[0]} of group {number} is zero, NaN or infinite")
        units.append(wide / norms)
    return tuple(units)
