"""Resident memory of one training step, for a small and a large batch of 18-megapixel images.

    python benchmarks/step_memory.py [--small 64] [--large 1024] [--chunk 8] [--tokens N]

`memory_ratio`: peak resident memory of a step on the large batch, divided by that on the small one.
`kept_ratio`: the same for a step that keeps all of its chunks, as a step that collates its whole
batch before it begins would. Each case runs in its own process, which collates by itself: what a
data worker holds is bounded by the number of chunks it may be ahead.

The images are photographs' sizes without their content: a few JPEGs of 5184 x 3456, under as many
names as there are examples, so that each is decoded as one of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from cafe.data.dataset import ExampleSet, ExampleSource
from cafe.model.tiny import tiny_model, tiny_processor
from cafe.model.vlm import CAFe
from cafe.recipes import Objective
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.data import TrainingData
from cafe.training.loader import KEPT_CHUNKS, Steps
from cafe.training.step import TrainingStep
from cafe.types import Example, Image, Message, user

WIDTH, HEIGHT = 5184, 3456
FILES = 4
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1"}
"""Freed memory is returned at once, and is not counted (as in gradcache.py)."""


def write_images(folder: Path, count: int) -> list[Path]:
    """`count` names of a few different files."""
    for number in range(FILES):
        coarse = np.random.default_rng(number).integers(0, 255, (27, 40, 3), dtype=np.uint8)
        image = PIL.Image.fromarray(coarse).resize((WIDTH, HEIGHT), PIL.Image.Resampling.BILINEAR)
        image.save(folder / f"{number}.jpg", quality=90)
    names = [folder / f"example-{i}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        name.symlink_to(folder / f"{i % FILES}.jpg")
    return names


def one_case(
    folder: Path, batch: int, chunk: int, tokens: int | None, keep: int
) -> dict[str, float]:
    """One step, and the peak of this process's memory."""
    torch.manual_seed(0)
    caption = "A photograph of the coast"
    processor = tiny_processor([caption, "Describe this image. Compress in one word:"] * 50)
    model = CAFe(tiny_model(processor), processor).train()
    examples = []
    for i in range(batch):
        image, text = Image(folder / f"example-{i}.jpg"), f"{caption} {i}"
        answer = (Message("user", (image, "Describe.")), Message("assistant", (text,)))
        examples.append(Example(str(i), user(image), user(text), dialogues=(answer,)))
    together = ExampleSet.build([ExampleSource("images", examples)])
    data = TrainingData(together, together.plan(batch, seed=0), steps=1)
    size = chunk if tokens is None else None
    steps = Steps(data, model.collator, size, chunk_tokens=tokens, keep=keep)
    step = TrainingStep(model, model, ContrastiveLoss(Objective()), Objective())
    began = time.perf_counter()
    metrics = step(steps[0].chunks)
    assert bool(torch.isfinite(metrics.contrastive))
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"mib": kibibytes / 1024, "seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", type=int, default=64)
    parser.add_argument("--large", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--tokens", type=int, help="chunks of this number of tokens instead")
    parser.add_argument("--case", nargs=3, help="folder, batch, kept chunks: only this, as JSON")
    arguments = parser.parse_args()
    if arguments.case:
        folder, batch, keep = arguments.case
        result = one_case(Path(folder), int(batch), arguments.chunk, arguments.tokens, int(keep))
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), arguments.large)

        def case(batch: int, keep: int) -> float:
            command = [sys.executable, __file__, *sys.argv[1:], "--case", folder]
            output = subprocess.run(
                [*command, str(batch), str(keep)],
                check=True,
                stdout=subprocess.PIPE,
                env={**os.environ, **RETURNED},
            ).stdout
            result = json.loads(output)
            print(
                f"batch {batch:5d}, {keep:5d} chunks kept: {result['mib']:7.0f} MiB, "
                f"{result['seconds']:.0f} s",
                flush=True,
            )
            return result["mib"]

        small, large = (case(batch, KEPT_CHUNKS) for batch in (arguments.small, arguments.large))
        everything = [case(batch, batch) for batch in (arguments.small, arguments.large)]
    print(f"memory_ratio: {large / small:.2f}")
    print(f"kept_ratio: {everything[1] / everything[0]:.2f}")


if __name__ == "__main__":
    main()
