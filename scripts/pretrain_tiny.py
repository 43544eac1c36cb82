"""Make the tiny base: a small real LLaVA-OneVision, pretrained with the language loss only.

    python scripts/pretrain_tiny.py --out runs/tiny-base --minutes 65

It learns captions and questions about endless scenes (`cafe.data.scenes`, train split): it talks,
and it cannot retrieve. Every example is one row: the picture's tokens once, then one branch per
caption and question. The result is copied to `src/cafe/model/tiny_base` by hand, with its card.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cafe.data.scenes import (
    PROMPT_CAPTION,
    QUESTION_KINDS,
    caption,
    draw,
    questions,
    sample_scene,
)
from cafe.data.scenes.world import random_stream, scene_seed
from cafe.model.checkpoint import save_checkpoint
from cafe.model.collate import Collator
from cafe.model.rows import Chunk
from cafe.model.tiny import tiny_model, tiny_processor
from cafe.model.vlm import CAFe
from cafe.objective import next_token_nll
from cafe.train.memory import keep_memory
from cafe.types import Example, Image, Message

MUON_LEARNING_RATE = 0.02
ADAM_LEARNING_RATE = 1e-3
WARMUP_STEPS = 30
SEED = 7


@dataclass(frozen=True)
class Phase:
    """What is shown for a share of the time: first one thing a picture, then everything.

    Naming single things first makes the vision tower useful within minutes; from the full mixture
    alone, it was still blind after 14 minutes (and 400 steps of AdamW).
    """

    max_objects: int
    question_kinds: frozenset[str]
    questions: int
    caption: bool
    pictures: int
    chunk: int


PHASES = (
    Phase(1, frozenset({"object", "size", "place"}), 2, False, 64, 32),
    Phase(4, frozenset({"object", "presence", "place", "size", "count"}), 6, False, 32, 16),
    Phase(4, frozenset(QUESTION_KINDS), 5, True, 32, 16),
)


class Batches(IterableDataset[list[Chunk]]):
    """Endless batches of fresh scenes, each collated in chunks of like length."""

    def __init__(self, collator: Collator, done: Any, until: list[float]) -> None:
        self.collator = collator
        self.until = until  # where each phase but the last ends
        self.done = done  # a shared number: how much of the time is over

    def __iter__(self) -> Iterator[list[Chunk]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in itertools.count(number, workers):
            phase = PHASES[sum(self.done.value > end for end in self.until)]
            size, chunk = phase.pictures, phase.chunk
            examples = [example(batch * size + i, phase) for i in range(size)]
            examples.sort(key=lambda e: sum(len(m.text) for d in e.dialogues for m in d))
            yield [self.collator(examples[i : i + chunk]) for i in range(0, size, chunk)]


def example(index: int, phase: Phase) -> Example:
    """One scene with its caption and some questions; scenes of the train split only."""
    for attempt in itertools.count():
        scene = sample_scene(scene_seed(SEED, index * 64 + attempt), "train")
        if len(scene.objects) <= phase.max_objects:
            break
    rng = random_stream(scene.seed, "train", "language")
    asked = [(PROMPT_CAPTION, caption(scene, rng))] if phase.caption else []
    found = [q for q in questions(scene, rng, 24) if q.kind in phase.question_kinds]
    if not phase.caption:  # what is where comes first
        found.sort(key=lambda q: q.kind != "object")
    if not found:
        asked = [(PROMPT_CAPTION, caption(scene, rng))]
    asked += [(q.text, q.answer) for q in found[: phase.questions]]
    picture = Image(draw(scene))
    return Example(
        id=str(scene.seed),
        dialogues=tuple(
            (Message("user", (picture, prompt)), Message("assistant", (answer,)))
            for prompt, answer in asked
        ),
    )


def corpus(scenes: int = 4000) -> Iterator[str]:
    """What the tokenizer learns its pieces from."""
    for index in range(scenes):
        for dialogue in example(index, PHASES[-1]).dialogues:
            for message in dialogue:
                yield message.text
    for _ in range(50):
        yield from ("Compress this image in one word:", "Compress this sentence in one word:")
        yield from ("Compress this image and sentence in one word:", "system user assistant")
        yield "You are a helpful assistant."


def pace(done: float, step: int) -> float:
    """Share of the peak learning rate: a short warm-up, level, then down to zero at the end."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, 0.02 + (1.0 - done) / 0.45)


def optimizers(model: CAFe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the towers, AdamW for everything else."""
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = [
        p
        for p in model.parameters()
        if p.ndim == 2 and "embed" not in names[id(p)] and "lm_head" not in names[id(p)]
    ]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(
            others, lr=ADAM_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=65)
    parser.add_argument("--start", type=Path, help="go on from this checkpoint directory")
    parser.add_argument("--until", type=float, nargs=2, default=[0.25, 0.55], help="ends of phases")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=200, help="steps")
    arguments = parser.parse_args()

    keep_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    if arguments.start:
        model = CAFe.from_pretrained(arguments.start).train()
    else:
        processor = tiny_processor(corpus())
        model = CAFe(tiny_model(processor), processor).train()
    both = optimizers(model)
    peaks = [group["lr"] for optimizer in both for group in optimizer.param_groups]
    progress = multiprocessing.Value("d", 0.0)
    loader = DataLoader(
        Batches(model.collator, progress, arguments.until),
        batch_size=None,
        num_workers=arguments.workers,
        prefetch_factor=8,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = (arguments.out / "log.jsonl").open("a")
    start = time.monotonic()
    for step, chunks in enumerate(loader):
        done = max((time.monotonic() - start) / 60 / arguments.minutes, step / arguments.steps)
        if done >= 1:
            break
        progress.value = done
        groups = [group for optimizer in both for group in optimizer.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * pace(done, step)
        began = time.monotonic()
        count = sum(chunk.label_count for chunk in chunks)
        total = torch.zeros(())
        for chunk in chunks:
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model(chunk.rows, chunk.vision).flatten(0, 1)
                states = hidden[chunk.rows.label_source]
                nll, _ = next_token_nll(states, chunk.rows.label_ids, model.lm_head.weight)
            (nll / count).backward()
            total += nll.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            now = time.monotonic()
            record = {
                "step": step,
                "minutes": round((now - start) / 60, 2),
                "loss": round(float(total) / count, 4),
                "norm": round(float(norm), 3),
                "step_seconds": round(now - began, 3),
                "tokens": [chunk.rows.input_ids.numel() for chunk in chunks],
            }
            log.write(json.dumps(record) + "\n")
            log.flush()
            print(record, flush=True)
        if step and step % arguments.save_every == 0:
            save(model, arguments.out / f"step-{step}")
    save(model, arguments.out / "final")


def save(model: CAFe, directory: Path) -> None:
    """bfloat16 weights: half the size, and what the model was trained with."""
    state = {k: v.clone() for k, v in model.model.state_dict().items()}
    model.model.to(torch.bfloat16)
    save_checkpoint(model.model, model.processor, model.collator, directory)
    model.model.to(torch.float32)
    model.model.load_state_dict(state)


if __name__ == "__main__":
    main()
