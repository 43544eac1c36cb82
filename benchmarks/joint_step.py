"""The trie step against the three passes of the published code: same model, same data, one run.

    python benchmarks/joint_step.py [--pixels 288] [--batch 8] [--repeats 9] [--precision auto]

Published (arXiv 2503.19900, `forward` of its code): one pass over the answers, one over the image
inputs and one over the text inputs; each runs the vision tower, the last one on zeros whose
features no token uses. `ratio_lean` compares with three passes without that wasted tower run. All
sides must have equal losses. The last line is `ratio: X`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from cafe.memory import keep_memory
from cafe.model.tiny import tiny_model, tiny_processor
from cafe.model.vlm import CAFe
from cafe.precision import resolved_precision
from cafe.recipes import Objective
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.step import TrainingStep
from three_passes import CAPTION, ThreePasses, make_examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=288, help="288 gives 300 image tokens")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    arguments = parser.parse_args()
    precision = resolved_precision(arguments.precision, "cpu")

    keep_memory()
    torch.manual_seed(0)
    processor = tiny_processor(
        [CAPTION, "Describe this image. Compress in one word:"] * 50, arguments.pixels
    )
    model = CAFe(tiny_model(processor), processor).train()
    examples = make_examples(arguments.batch, arguments.pixels)
    chunk = model.collator(examples)
    image_tokens = int((chunk.rows.input_ids[0] == processor.image_token_id).sum())
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters / 1e6:.1f}M parameters, batch {arguments.batch}, "
        f"{image_tokens} image tokens, row of {chunk.rows.input_ids.shape[1]} tokens, "
        f"{precision}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()

    bf16 = precision == "bf16"
    objective = Objective()
    step = TrainingStep(model, model, ContrastiveLoss(objective), objective, autocast=autocast)

    def trie() -> tuple[float, float]:
        numbers = step([chunk])
        return float(numbers.contrastive), float(numbers.language)

    def in_autocast(passes: ThreePasses) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            with autocast():
                return passes()

        return run

    sides = {
        "three passes (published)": in_autocast(ThreePasses(model, examples, zero_images=True)),
        "three passes (lean)": in_autocast(ThreePasses(model, examples, zero_images=False)),
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
    for name, pair in losses.items():
        print(
            f"{name:26s} contrastive {pair[0]:.5f}  language {pair[1]:.5f}  "
            f"median {statistics.median(times[name]):.3f} s"
        )
        difference = max(abs(a - b) for a, b in zip(pair, reference, strict=True))
        assert difference < tolerance, f"{name}: losses differ by {difference}"
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"ratio_lean: {median['three passes (lean)'] / median['trie step']:.2f}")
    print(f"ratio: {median['three passes (published)'] / median['trie step']:.2f}")


if __name__ == "__main__":
    main()
