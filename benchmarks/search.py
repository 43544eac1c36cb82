"""Recall and speed of the approximate index against exact search.

    python benchmarks/search.py [--rows 100000] [--dimension 256] [--queries 200]

Vectors are random around random centres. Queries are drawn as the rows are, and are not among
them. `recall@10` is the share of the exact search's ten nearest that the approximate search, with
the settings that it chose by itself, finds; the exact search is checked against numpy. Times are of
one search after another in one thread of Python. Last line: `ratio: X`, approximate over exact
queries per second.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cafe.index import Index, ModelFacts, Row
from cafe.types import Hit

CENTRES_PER_ROW = 0.01
SPREAD = 0.7  # of a cluster, where centres are at distance one from each other, per coordinate
TOP = 10
CHECKED = 20


def clustered(rng: np.random.Generator, centres: np.ndarray, count: int) -> np.ndarray:
    """Unit vectors float32 [count, d] around `centres` [c, d]."""
    chosen = centres[rng.integers(0, len(centres), count)]
    vectors = chosen + SPREAD * rng.normal(size=chosen.shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(folder: Path, vectors: np.ndarray) -> Index:
    index = Index.create(folder, ModelFacts("random", "", "", vectors.shape[1]))
    rows = [Row(str(i), "image", f"{i}.jpg") for i in range(len(vectors))]
    index.add(rows, vectors, new=True)
    return index


def timed(search: Callable[[np.ndarray], list[Hit]], queries: np.ndarray) -> tuple[list, float]:
    """Ids found for each query, and queries per second; the first query warms up, uncounted."""
    search(queries[0])
    start = time.perf_counter()
    found = [[hit.id for hit in search(query)] for query in queries]
    return found, len(queries) / (time.perf_counter() - start)


def recall(found: list[list[str]], true: list[list[str]]) -> float:
    return float(np.mean([len({*f} & {*t}) / len(t) for f, t in zip(found, true, strict=True)]))


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
    print(f"exact search against numpy: {same:.3f} of {CHECKED} x {TOP} nearest are the same")
    print(
        f"index built and measured in {seconds:.1f} s: {measured.partitions} partitions, "
        f"{measured.probes} looked into, refine {measured.refine}; it measured recall@{TOP} "
        f"{measured.recall:.3f} by itself"
    )
    print(f"recall@{TOP}: {recall(near, exact):.3f}")
    print(f"exact: {exact_speed:.1f} queries/s")
    print(f"approximate: {near_speed:.1f} queries/s")
    print(f"ratio: {near_speed / exact_speed:.2f}")


if __name__ == "__main__":
    main()
