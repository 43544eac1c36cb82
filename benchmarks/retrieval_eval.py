"""Scoring of image-text retrieval: time and peak memory against the straightforward computation.

    python benchmarks/retrieval_eval.py                  5,000 images x 25,000 captions, 1,024-d
    python benchmarks/retrieval_eval.py --images 500     a quick look

`blockwise` is `cafe.evaluation.tasks.retrieval.retrieval_scores`. `dense` is what scripts for COCO
do: all scores as one matrix, the top k of each row and column, and a boolean matrix of positives
(CAFe's published script also builds an n x k x n one-hot tensor, which is omitted: at this size it
would not fit in memory).
Each runs in its own process. Memory is the growth of the peak resident set over the embeddings,
which both need. Recalls must agree.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

KS = (1, 5, 10)


def embeddings(images: int, captions: int, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Captions near their images, so that recall is neither 0 nor 1; unit length, float32."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((images, dimensions), dtype=np.float32)
    y = np.repeat(x, captions, axis=0)
    y += 9 * rng.standard_normal(y.shape, dtype=np.float32)
    for side in (x, y):
        side /= np.linalg.norm(side, axis=1, keepdims=True)
    return x, y


def blockwise(x: np.ndarray, y: np.ndarray, captions: int) -> dict[str, float]:
    from cafe.evaluation.tasks.retrieval import ranges, retrieval_scores

    return retrieval_scores(x, y, ranges([captions] * len(x))).scores


def dense(x: np.ndarray, y: np.ndarray, captions: int) -> dict[str, float]:
    scores = x @ y.T
    own = np.arange(len(y)) // captions
    positive = np.zeros(scores.shape, dtype=bool)
    positive[own, np.arange(len(y))] = True
    recalls = {}
    for name, table, relevant in (
        ("image_to_text", scores, positive),
        ("text_to_image", scores.T, positive.T),
    ):
        for k in KS:
            best = np.argpartition(-table, k - 1, axis=1)[:, :k]
            hits = np.take_along_axis(relevant, best, axis=1).any(axis=1)
            recalls[f"{name}_recall@{k}"] = float(hits.mean())
    return recalls


def reset_peak() -> None:
    """Reset the peak (Linux): creating the embeddings had a peak of its own."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Peak resident memory since the reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(kind: str, images: int, captions: int, dimensions: int) -> dict[str, object]:
    """Seconds, growth of the peak in MiB, and the recalls, measured in this process."""
    run = {"blockwise": blockwise, "dense": dense}[kind]
    run(*embeddings(8 * max(KS), 2, 8), 2)  # imports and first calls
    x, y = embeddings(images, captions, dimensions)
    reset_peak()
    before = peak_mib()
    begin = time.perf_counter()
    scores = run(x, y, captions)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "mib": peak_mib() - before, "scores": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=5, help="per image")
    parser.add_argument("--dimensions", type=int, default=1024)
    parser.add_argument("--kind", choices=("blockwise", "dense"), help="only this, as JSON")
    arguments = parser.parse_args()
    sizes = (arguments.images, arguments.captions, arguments.dimensions)
    if arguments.kind:
        print(json.dumps(measure(arguments.kind, *sizes)))
        return
    results = {}
    for kind in ("blockwise", "dense"):
        options = [
            f"--{n}={v}" for n, v in zip(("images", "captions", "dimensions"), sizes, strict=True)
        ]
        command = [sys.executable, __file__, "--kind", kind, *options]
        process = subprocess.run(command, check=True, capture_output=True, text=True)
        results[kind] = json.loads(process.stdout)
        print(
            f"{kind:<10} {results[kind]['seconds']:8.2f} s  {results[kind]['mib']:8.0f} MiB",
            flush=True,
        )
    a, b = results["blockwise"], results["dense"]
    print(f"ratio (dense / blockwise)  time {b['seconds'] / a['seconds']:.2f}, ", end="")
    print(f"memory {b['mib'] / max(a['mib'], 1):.2f}")
    worst = max(abs(a["scores"][name] - value) for name, value in b["scores"].items())
    print(f"largest difference of a recall: {worst:.1e}")
    print({name: round(value, 4) for name, value in a["scores"].items()})


if __name__ == "__main__":
    main()
