"""The trie step against the three passes of the published code: same model, same data, one run.

    python benchmarks/joint_step.py [--pixels 192] [--batch 8] [--repeats 5] [--precision bf16]

Published (arXiv 2503.19900, its code's `forward`): a pass over the answers, one over the picture
embeddings, one over the text embeddings; each runs the vision tower, the last one on zeros that no
token shows. `ratio_lean` is against three passes without that wasted tower run.
Both sides are checked to have equal losses. The last line is `ratio: X`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.nn import functional

from cafe.media import open_image
from cafe.model.tiny import tiny_model, tiny_processor
from cafe.model.vlm import CAFe
from cafe.objective import info_nce
from cafe.recipes import Objective
from cafe.train.contrast import Contrast
from cafe.train.memory import keep_memory
from cafe.train.step import TrainingStep
from cafe.types import Example, Image, Message, user

CAPTION = "a big red cat at the top left and a small green car in the centre of the picture"


def make_examples(count: int, pixels: int) -> list[Example]:
    rng = np.random.default_rng(0)
    examples = []
    for i in range(count):
        noise = rng.integers(0, 255, (pixels, pixels, 3), dtype=np.uint8)
        picture, text = Image(PIL.Image.fromarray(noise)), f"{CAPTION} number {i}"
        turns = (
            Message("user", (picture, "Describe this image.")),
            Message("assistant", (text,)),
        )
        examples.append(
            Example(id=str(i), query=user(picture), target=user(text), dialogues=(turns,))
        )
    return examples


class ThreePasses:
    """The published step: three sequences per example, each in a pass of its own."""

    def __init__(self, model: CAFe, examples: list[Example], *, zero_pictures: bool) -> None:
        collator, self.model = model.collator, model
        queries = [collator.render_embedding(e.query, "compress") for e in examples if e.query]
        targets = [collator.render_embedding(e.target, "compress") for e in examples if e.target]
        answers = [s for e in examples for d in e.dialogues for s in collator.render_answers(d)]
        self.query, self.target = self._inputs(queries), self._inputs(targets)
        self.answer = self._inputs(answers)
        self.labels = torch.full_like(self.answer["input_ids"], -100)
        for row, sequence in enumerate(answers):
            tail = sequence.text[-sequence.labelled :]
            n = len(model.processor.tokenizer(tail, add_special_tokens=False)["input_ids"])
            end = int(self.answer["attention_mask"][row].sum())
            self.labels[row, end - n : end] = self.answer["input_ids"][row, end - n : end]
        self.zeros = None
        if zero_pictures:
            self.zeros = {
                k: torch.zeros_like(v) if v.is_floating_point() else v
                for k, v in self.query.items()
                if k not in ("input_ids", "attention_mask")
            }

    def _inputs(self, sequences: list[Any]) -> dict[str, torch.Tensor]:
        images = [[open_image(i) for i in s.images] for s in sequences if s.images]
        return dict(
            self.model.processor(
                text=[s.text for s in sequences],
                images=images or None,
                padding=True,
                padding_side="right",
                add_special_tokens=False,
                return_tensors="pt",
            )
        )

    def _last(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        states = self.model.model.model(**inputs, use_cache=False).last_hidden_state
        return states[torch.arange(len(states)), inputs["attention_mask"].sum(1) - 1].float()

    def __call__(self) -> tuple[float, float]:
        states = self.model.model.model(**self.answer, use_cache=False).last_hidden_state
        logits = self.model.lm_head(states)
        language = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), self.labels[:, 1:].flatten(), ignore_index=-100
        )
        query, target = self._last(self.query), self._last(self.target)
        if self.zeros is not None:
            # Its features meet no placeholder: a zero-length slice, kept for the graph's sake.
            features = self.model.family.image_features(self.model.model.model, self.zeros)
            target = target + torch.cat(features)[:0].sum()
        contrastive = info_nce(query, target)
        (contrastive + language).backward()
        return contrastive.item(), language.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=192, help="192: 300 picture tokens")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
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
