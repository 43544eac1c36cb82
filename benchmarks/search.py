"""Recall and speed of the approximate index against exact search.

    python benchmarks/search.py [--rows 100000] [--dimension 256] [--queries 200]

Vectors are random around random cluster centres. Queries are sampled in the same way and are not
among the rows. `recall@10` is the share of the ten exact nearest neighbours that the approximate
search finds with the settings it chose automatically; the exact search is checked against numpy.
Searches run one after another in a single Python thread. The last line is `ratio: X`, approximate
divided by exact queries per second.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cafe.index import Index, IndexRow, ModelFacts
from cafe.types import Hit

CENTRES_PER_ROW = 0.01
SPREAD = 0.7  # standard deviation of a cluster per coordinate; that of the centres is 1
TOP = 10
CHECKED = 20


def clustered(rng: np.random.Generator, centres: np.ndarray, count: int) -> np.ndarray:
    """Unit vectors float32 [count, d] around `centres` [c, d]."""
    chosen = centres[rng.integers(0, len(centres), count)]
    vectors = chosen + SPREAD * rng.normal(size=chosen.shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(folder: Path, vectors: np.ndarray) -> Index:
    index = Index.create(folder, ModelFacts("random", "", "", vectors.shape[1]))
    rows = [IndexRow(str(i), "image", f"{i}.jpg") for i in range(len(vectors))]
    index.add(rows, vectors, new=True)
    return index


def timed(search: Callable[[np.ndarray], list[Hit]], queries: np.ndarray) -> tuple[list, float]:
    """The ids returned for each query, and queries per second; one uncounted query warms up."""
    search(queries[0])
    start = time.perf_counter()
    ids = [[hit.id for hit in search(query)] for query in queries]
    return ids, len(queries) / (time.perf_counter() - start)


def recall(ids: list[list[str]], exact: list[list[str]]) -> float:
    return float(np.mean([len({*i} & {*e}) / len(e) for i, e in zip(ids, exact, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--queries", type=int, default=200)
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    count = max(1, int(CENTRES_PER_ROW * options.rows))
    centres = rng.normal(size=(count, options.dimension)).astype(np.float32)
    vectors = clustered(rng, centres, options.rows)
    queries = clustered(rng, centres, options.queries)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        index = filled(Path(folder), vectors)
        start = time.perf_counter()
        measured = index.optimize(threshold=0)
        seconds = time.perf_counter() - start
        assert measured is not None
        exact, exact_speed = timed(lambda q: index.search(q, TOP, exact=True), queries)
        near, near_speed = timed(lambda q: index.search(q, TOP), queries)
    dense = np.argsort(-(queries[:CHECKED] @ vectors.T), axis=1)[:, :TOP]
    same = recall(exact[:CHECKED], [[str(i) for i in row] for row in dense])
    print(f"{options.rows:,} vectors of {options.dimension}, {options.queries} queries")
    print(f"exact search against numpy: {same:.3f} of {CHECKED} x {TOP} nearest neighbours agree")
    print(
        f"index built and measured in {seconds:.1f} s: {measured.partitions} partitions, "
        f"{measured.probes} probed, refine {measured.refine}; recall@{TOP} measured by the index: "
        f"{measured.recall:.3f}"
    )
    print(f"recall@{TOP}: {recall(near, exact):.3f}")
    print(f"exact: {exact_speed:.1f} queries/s")
    print(f"approximate: {near_speed:.1f} queries/s")
    print(f"ratio: {near_speed / exact_speed:.2f}")


if __name__ == "__main__":
    main()
