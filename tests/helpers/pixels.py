"""Images with vectors a person can check, and a run that a test kills.

python -m helpers.pixels FOLDER INDEX: bring INDEX up to date with FOLDER, one line per batch that
is embedded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from cafe.index import Index, IndexItem, ModelFacts, sync
from cafe.types import Image

DIMENSION = 4
FACTS = ModelFacts("pixels", "w", "p", DIMENSION)
BATCH = 3
SECONDS_PER_BATCH = 0.05


def colour(number: int) -> tuple[int, int, int]:
    """A different one for each number below 1,000."""
    return (25 * (number % 10), 25 * (number // 10 % 10), 25 * (number // 100))


def paint(folder: Path, numbers: Sequence[int]) -> None:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        PIL.Image.new("RGB", (4, 3), colour(number)).save(folder / f"{number:03d}.png")


def encode(values: Sequence[Any]) -> np.ndarray:
    """(1, red, green, blue) of an image, (1, length, 0, 0) of a text: never zero."""
    return np.array([_vector(value) for value in values], dtype=np.float32)


def _vector(value: Any) -> list[float]:
    if isinstance(value, str):
        return [1, len(value), 0, 0]
    return [1, *(channel / 100 for channel in value.getpixel((0, 0)))]


def expected(number: int) -> np.ndarray:
    vector = np.array([1, *(channel / 100 for channel in colour(number))], dtype=np.float64)
    return vector / np.linalg.norm(vector)


def items_of(folder: Path) -> list[IndexItem]:
    return [
        IndexItem(file.name, file.name, Image(file), file.name) for file in sorted(folder.iterdir())
    ]


def main(folder: str, uri: str) -> None:
    def slow(values: Sequence[Any]) -> np.ndarray:
        vectors = encode(values)
        time.sleep(SECONDS_PER_BATCH)
        print("embedded", len(vectors), flush=True)
        return vectors

    index = Index.find(uri) or Index.create(uri, FACTS)
    report = sync(index, items_of(Path(folder)), slow, batch_size=BATCH)
    print("report", report.added, report.unchanged, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
