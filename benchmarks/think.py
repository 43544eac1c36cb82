"""What reading an embedding by the key-value cache of its thought saves, against reading anew.

    python benchmarks/think.py [MODEL] [--images 64] [--tokens 64]

Both ways embed the same generated scenes after the model's own thoughts, in turns, three times
each; the least time of each counts. Printed: seconds per 1,000 images of the plain embedding, of
writing alone, of both ways, their ratio, and how far apart their embeddings are.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cafe.data.scenes import write_scenes
from cafe.memory import keep_memory
from cafe.model.thoughts import encode_with_thoughts
from cafe.model.vlm import CAFe

ROUNDS = 3
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    keep_memory()
    model = CAFe.from_pretrained(options.model)
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder), options.images, seed=5)
        images: list[Any] = sorted(Path(folder, "images").iterdir())
        ways: dict[str, Callable[[], Any]] = {
            "plain": lambda: model.encode(images, batch_size=BATCH),
            "writing alone": lambda: model.write_captions(
                images, max_new_tokens=options.tokens, batch_size=BATCH
            ),
            "anew": lambda: read_anew(model, images, options.tokens),
            "by the cache": lambda: (
                encode_with_thoughts(model, images, options.tokens, BATCH).vectors
            ),
        }
        seconds = dict.fromkeys(ways, np.inf)
        results: dict[str, Any] = {}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                begin = time.perf_counter()
                results[name] = way()
                seconds[name] = min(seconds[name], time.perf_counter() - begin)
    print(f"{options.model}, {options.images} images, {torch.get_num_threads()} threads")
    for name, value in seconds.items():
        print(f"{name:14s} {1000 * value / options.images:8.1f} s per 1,000 images")
    print(f"ratio anew / by the cache: {seconds['anew'] / seconds['by the cache']:.2f}")
    apart = np.linalg.norm(results["anew"] - results["by the cache"], axis=1).max()
    print(f"largest distance of two embeddings: {apart:.1e}")


def read_anew(model: CAFe, images: list[Any], tokens: int) -> np.ndarray:
    """The slow way: thoughts first, then the whole texts with their images."""
    thoughts = model.write_captions(images, max_new_tokens=tokens, batch_size=BATCH)
    return model.encode(images, think=thoughts, batch_size=BATCH)


if __name__ == "__main__":
    main()
