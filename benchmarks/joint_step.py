"""The trie step against the three passes of the published code: same model, same data, one run.

    python benchmarks/joint_step.py [--pixels 288] [--batch 8] [--repeats 9] [--precision bf16]

Published (arXiv 2503.19900, its code's `forward`): a pass over the answers, one over the picture
embeddings, one over the text embeddings; each runs the vision tower, the last one on zeros that no
token shows. `ratio_lean` is against three passes without that wasted tower run.
Both sides are checked to have equal losses. The last line is `ratio: X`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from cafe.memory import keep_memory
from cafe.model.tiny import tiny_model, tiny_processor
from cafe.model.vlm import CAFe
from cafe.recipes import Objective
from cafe.train.contrast import Contrast
from cafe.train.step import TrainingStep
from three_passes import CAPTION, ThreePasses, make_examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=288, help="288: 300 picture tokens")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    arguments = parser.parse_args()

    keep_memory()
    torch.manual_seed(0)
    processor = tiny_processor(
        [CAPTION, "Describe this image. Compress in one word:"] * 50, arguments.pixels
    )
    model = CAFe(tiny_model(processor), processor).train()
    examples = make_examples(arguments.batch, arguments.pixels)
    chunk = model.collator(examples)
    picture_tokens = int((chunk.rows.input_ids[0] == processor.image_token_id).sum())
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters / 1e6:.1f}M parameters, batch {arguments.batch}, "
        f"{picture_tokens} picture tokens, row of {chunk.rows.input_ids.shape[1]} tokens, "
        f"{arguments.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()

    bf16 = arguments.precision == "bf16"
    objective = Objective()
    step = TrainingStep(model, model, Contrast(objective), objective, autocast=autocast)

    def trie() -> tuple[float, float]:
        numbers = step([chunk])
        return float(numbers.contrastive), float(numbers.language)

    def in_autocast(passes: ThreePasses) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            with autocast():
                return passes()

        return run

    sides = {
        "three passes (published)": in_autocast(ThreePasses(model, examples, zero_pictures=True)),
        "three passes (lean)": in_autocast(ThreePasses(model, examples, zero_pictures=False)),
        "trie step": trie,
    }
    losses = {name: run() for name, run in sides.items()}  # also the warm-up
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name, run in sides.items():
            model.zero_grad()
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    tolerance = 0.05 if bf16 else 1e-4
    reference = losses["three passes (published)"]
    for name, found in losses.items():
        print(
            f"{name:26s} contrastive {found[0]:.5f}  language {found[1]:.5f}  "
            f"median {statistics.median(times[name]):.3f} s"
        )
        difference = max(abs(a - b) for a, b in zip(found, reference, strict=True))
        assert difference < tolerance, f"{name}: losses differ by {difference}"
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"ratio_lean: {median['three passes (lean)'] / median['trie step']:.2f}")
    print(f"ratio: {median['three passes (published)'] / median['trie step']:.2f}")


if __name__ == "__main__":
    main()
