"""Scoring of image-text retrieval: time and peak memory against the straightforward computation.

    python benchmarks/retrieval_eval.py                  5,000 images x 25,000 captions, 1,024-d
    python benchmarks/retrieval_eval.py --images 500     a quick look

`blockwise` is `cafe.evaluate.retrieval.retrieval_scores`. `dense` is what scripts for COCO do: all
scores as one matrix, the first k of each row and column, and a boolean matrix of positives (in
CAFe's own script also an n x k x n one-hot tensor, which at this size would not fit: left out).
Each runs in a process of its own. Memory is the growth of the peak resident set over the
embeddings, which both need. Recalls must agree.
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
    """Captions near their pictures, so that recall is neither 0 nor 1; unit length, float32."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((images, dimensions), dtype=np.float32)
    y = np.repeat(x, captions, axis=0)
    y += 9 * rng.standard_normal(y.shape, dtype=np.float32)
    for side in (x, y):
        side /= np.linalg.norm(side, axis=1, keepdims=True)
    return x, y


def blockwise(x: np.ndarray, y: np.ndarray, captions: int) -> dict[str, float]:
    from cafe.evaluate.retrieval import ranges, retrieval_scores

    return retrieval_scores(x, y, ranges([captions] * len(x))).scores


def dense(x: np.ndarray, y: np.ndarray, captions: int) -> dict[str, float]:
    scores = x @ y.T
    own = np.arange(len(y)) // captions
    positive = np.zeros(scores.shape, dtype=bool)
    positive[own, np.arange(len(y))] = True
    found = {}
    for name, table, right in (
        ("image_to_text", scores, positive),
        ("text_to_image", scores.T, positive.T),
    ):
        for k in KS:
            best = np.argpartition(-table, k - 1, axis=1)[:, :k]
            hits = np.take_along_axis(right, best, axis=1).any(axis=1)
            found[f"{name}_recall@{k}"] = float(hits.mean())
    return found


def reset_peak() -> None:
    """Forget the peak so far (Linux): making the embeddings had one of its own."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Peak resident memory since the reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(kind: str, images: int, captions: int, dimensions: int) -> dict[str, object]:
    """In this process: seconds, growth of the peak in MiB, and the recalls."""
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
    parser.add_argument("--captions", type=int, default=5, help="of each image")
    parser.add_argument("--dimensions", type=int, default=1024)
    parser.add_argument("--kind", choices=("blockwise", "dense"), help="only this one, as JSON")
    given = parser.parse_args()
    sizes = (given.images, given.captions, given.dimensions)
    if given.kind:
        print(json.dumps(measure(given.kind, *sizes)))
        return
    found = {}
    for kind in ("blockwise", "dense"):
        options = [
            f"--{n}={v}" for n, v in zip(("images", "captions", "dimensions"), sizes, strict=True)
        ]
        command = [sys.executable, __file__, "--kind", kind, *options]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[kind] = json.loads(done.stdout)
        print(
            f"{kind:<10} {found[kind]['seconds']:8.2f} s  {found[kind]['mib']:8.0f} MiB", flush=True
        )
    a, b = found["blockwise"], found["dense"]
    print(f"ratio (dense / blockwise)  time {b['seconds'] / a['seconds']:.2f}, ", end="")
    print(f"memory {b['mib'] / max(a['mib'], 1):.2f}")
    worst = max(abs(a["scores"][name] - value) for name, value in b["scores"].items())
    print(f"largest difference of a recall: {worst:.1e}")
    print({name: round(value, 4) for name, value in a["scores"].items()})


if __name__ == "__main__":
    main()
