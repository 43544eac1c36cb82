"""Memory and time of the cached joint step.

    python benchmarks/gradcache.py [--large 512] [--chunk 32]

`memory_ratio`: peak memory of one step on batch 512 in chunks of 32, over that of batch 32 in one
piece (both above what the process held before the step). `time_ratio`: batch 512 in chunks of 32,
over batch 512 in one piece. Each case runs in a process of its own.

Memory is what the process holds in RAM, measured where glibc gives every freed block above 64 KiB
back at once, and oneDNN keeps no compiled kernels: else one would measure the holes between blocks
of different sizes, and the kernels for every length of a row, which a long run has in any case.
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

sys.path.insert(0, str(Path(__file__).parent))
from cafe.memory import keep_memory
from cafe.model.tiny import tiny_model, tiny_processor
from cafe.model.vlm import CAFe
from cafe.recipes import Objective
from cafe.train.contrast import Contrast
from cafe.train.step import TrainingStep
from three_passes import CAPTION, make_examples

NOTHING_KEPT = {"MALLOC_MMAP_THRESHOLD_": "65536", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1"}


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def one_case(batch: int, chunk: int) -> dict[str, float]:
    """Two steps: the first to warm up, the second measured in time; memory over both."""
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        keep_memory()
    torch.manual_seed(0)
    processor = tiny_processor([CAPTION, "Describe this image. Compress in one word:"] * 50)
    model = CAFe(tiny_model(processor), processor).train()
    examples = make_examples(batch, 96)
    chunks = [model.collator(examples[i : i + chunk]) for i in range(0, batch, chunk)]
    objective = Objective()
    step = TrainingStep(
        model,
        model,
        Contrast(objective),
        objective,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
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
    parser.add_argument("--case", type=int, nargs=2, help="batch and chunk: one case, as JSON")
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
    held = []
    for batch in (chunk, large):
        found = case(batch, chunk, **NOTHING_KEPT)
        held.append(found["bytes"])
        show(batch, chunk, f"{found['bytes'] / 2**20:7.0f} MiB above the start", found["loss"])
    took = []
    losses = []
    for size in (chunk, large):
        found = case(large, size)
        took.append(found["seconds"])
        losses.append(found["loss"])
        show(large, size, f"{found['seconds']:7.2f} s", found["loss"])
    assert abs(losses[0] - losses[1]) < 0.05, "the cached step has another loss"
    print(f"memory_ratio: {held[1] / held[0]:.2f}")
    print(f"time_ratio: {took[0] / took[1]:.2f}")


if __name__ == "__main__":
    main()
