"""Memory and time of the cached joint step.

    python benchmarks/gradcache.py [--large 512] [--chunk 32]

`memory_ratio`: peak memory of one step on batch 512 in chunks of 32, divided by that of batch 32 in
one chunk (both above the memory that the process held before the step). `time_ratio`: batch 512 in
chunks of 32, divided by batch 512 in one chunk. Each case runs in its own process.

Memory is the resident set, measured with glibc returning every freed block above 64 KiB immediately
and with oneDNN caching no compiled kernels. Otherwise it would include the holes between blocks of
different sizes, and the kernels for every row length, which a long run has in any case.
Time is measured as `cafe train` runs, with freed memory kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from cafe.memory import keep_memory
from cafe.model.tiny import tiny_model, tiny_processor
from cafe.model.vlm import CAFe
from cafe.precision import resolved_precision
from cafe.recipes import Objective
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.step import TrainingStep
from three_passes import CAPTION, make_examples

NOTHING_KEPT = {"MALLOC_MMAP_THRESHOLD_": "65536", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1"}


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def one_case(batch: int, chunk: int) -> dict[str, float]:
    """Two steps: the first warms up, the second is timed; peak memory is taken over both."""
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        keep_memory()
    torch.manual_seed(0)
    processor = tiny_processor([CAPTION, "Describe this image. Compress in one word:"] * 50)
    model = CAFe(tiny_model(processor), processor).train()
    examples = make_examples(batch, 96)
    chunks = [model.collator(examples[i : i + chunk]) for i in range(0, batch, chunk)]
    objective = Objective()
    bf16 = resolved_precision("auto", "cpu") == "bf16"
    step = TrainingStep(
        model,
        model,
        ContrastiveLoss(objective),
        objective,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    )
    before, peak, stop = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = 0.0
    for _ in range(2):
        model.zero_grad()
        began = time.perf_counter()
        loss = step(chunks)
        seconds = time.perf_counter() - began
    stop.set()
    watcher.join()
    return {
        "bytes": peak[0] - before,
        "seconds": seconds,
        "loss": float(loss.contrastive + loss.language),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--case", type=int, nargs=2, help="batch and chunk: only this, as JSON")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(one_case(*arguments.case)))
        return

    def case(batch: int, chunk: int, **environment: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--case", str(batch), str(chunk)]
        output = subprocess.run(
            command, check=True, capture_output=True, env={**os.environ, **environment}
        ).stdout
        return json.loads(output)

    def show(batch: int, chunk: int, number: str, loss: float) -> None:
        print(f"batch {batch:4d} in chunks of {chunk:4d}: {number}, loss {loss:.4f}", flush=True)

    large, chunk = arguments.large, arguments.chunk
    peaks = []
    for batch in (chunk, large):
        result = case(batch, chunk, **NOTHING_KEPT)
        peaks.append(result["bytes"])
        show(batch, chunk, f"{result['bytes'] / 2**20:7.0f} MiB above the start", result["loss"])
    seconds = []
    losses = []
    for size in (chunk, large):
        result = case(large, size)
        seconds.append(result["seconds"])
        losses.append(result["loss"])
        show(large, size, f"{result['seconds']:7.2f} s", result["loss"])
    assert abs(losses[0] - losses[1]) < 0.05, "the loss of the cached step differs"
    print(f"memory_ratio: {peaks[1] / peaks[0]:.2f}")
    print(f"time_ratio: {seconds[0] / seconds[1]:.2f}")


if __name__ == "__main__":
    main()
