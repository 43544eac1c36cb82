"""The trie step against three separate passes, for every family, on small random models.

    python benchmarks/families.py [--family qwen3_vl] [--batch 4] [--repeats 3] [--pixels 256]

Each family is the class of transformers with its own attention rule, positions and tiles, and a few
hundred image tokens. The separate passes (query, target, answer) are written as a user of
transformers would: processor, padding, `model(**inputs)`, one pass each; the passes over texts run
no vision tower. Both sides must have equal losses. The last line of each family is
`family ratio: X`, the time of the three passes divided by the time of the trie step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from cafe.memory import keep_memory
from cafe.model.vlm import CAFe
from cafe.recipes import Objective
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.step import TrainingStep
from helpers import builders
from three_passes import ThreePasses, make_examples

SIZES = builders.Sizes(width=256, layers=4, heads=4, view=128, image=256, window=512)
# These show an image as an overview and four tiles, each with all its patches.
SMALLER_VIEWS = {"llava_onevision", "llava_next"}


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def compare(name: str, batch: int, repeats: int, pixels: int) -> float:
    """Print the losses and times of one family, and return the ratio of the times."""
    sizes = replace(SIZES, view=SIZES.view // 2) if name in SMALLER_VIEWS else SIZES
    with tempfile.TemporaryDirectory() as directory:
        saved = builders.build(name, Path(directory), sizes)
        model = CAFe.from_pretrained(saved, dtype=torch.float32, device="cpu")
    examples = make_examples(batch, pixels)
    objective = Objective(temperature=0.05)
    chunk = model.collator(examples)
    passes = ThreePasses(model, examples, zero_images=False)
    step = TrainingStep(model, model, ContrastiveLoss(objective), objective)

    def trie() -> tuple[float, float]:
        numbers = step([chunk])
        return numbers.contrastive.item(), numbers.language.item()

    sides: dict[str, Callable[[], tuple[float, float]]] = {"passes": passes, "trie": trie}
    losses = {side: run() for side, run in sides.items()}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, run in sides.items():
            model.zero_grad()
            times[side].append(timed(run))
    difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    assert difference < 2e-4, f"{name}: losses differ by {difference}"
    placeholder = model.family.placeholder_id(model.processor)
    image_tokens = int((chunk.rows.input_ids[0] == placeholder).sum())
    median = {side: statistics.median(values) for side, values in times.items()}
    print(
        f"{name:16s} {sum(p.numel() for p in model.parameters()) / 1e6:5.1f}M parameters, "
        f"{image_tokens} of {chunk.rows.input_ids.shape[1]} tokens of a row are image tokens, "
        f"losses {losses['trie'][0]:.4f} and {losses['trie'][1]:.4f} "
        f"(difference {difference:.0e}), passes {median['passes']:.2f} s, "
        f"trie {median['trie']:.2f} s"
    )
    return median["passes"] / median["trie"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=builders.NAMES, action="append")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pixels", type=int, default=256)
    arguments = parser.parse_args()
    keep_memory()
    for name in arguments.family or builders.NAMES:
        ratio = compare(name, arguments.batch, arguments.repeats, arguments.pixels)
        print(f"{name} ratio: {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
