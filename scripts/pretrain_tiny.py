"""Make the tiny base: a small real LLaVA-OneVision that talks, and cannot retrieve.

    python scripts/pretrain_tiny.py --out runs/tiny-base

Two stages, as real ones are made. `pretrain_tower`: the vision tower names what its patches show.
Then the whole model with the language loss only: captions and questions about endless scenes
(`cafe.data.scenes`, train split), every example one row: the picture's tokens once, then one
branch per caption and question. The result is copied to `src/cafe/model/tiny_base` by hand, with
its card.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pretrain_tower import pretrain_tower
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cafe.data.scenes import (
    PROMPT_CAPTION,
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
SIGHT_LEARNING_RATE = 0.004  # of tower and projector, which come pretrained
ADAM_LEARNING_RATE = 1e-3
WARMUP_STEPS = 30


PICTURES, CHUNK = 32, 16
QUESTIONS = 8  # per picture: branches cost little, and ground the model faster than captions alone
# Finding a thing by its name is learned last, and slowly from the mixture: yes or no tells little.
# So there is a time in which most questions need it.
FINDING = ("presence", "place", "size", "object")
FINDING_QUESTIONS = 12


class Batches(IterableDataset[list[Chunk]]):
    """Endless batches of fresh scenes, each collated in chunks of like length."""

    def __init__(self, collator: Collator, finding: Any, seed: int) -> None:
        self.collator = collator
        self.seed = seed
        self.finding = finding  # a number that the training process may change

    def __iter__(self) -> Iterator[list[Chunk]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in itertools.count(number, workers):
            examples = [
                example(self.seed, batch * PICTURES + i, bool(self.finding.value))
                for i in range(PICTURES)
            ]
            examples.sort(key=lambda e: sum(len(m.text) for d in e.dialogues for m in d))
            yield [self.collator(examples[i : i + CHUNK]) for i in range(0, PICTURES, CHUNK)]


def example(seed: int, index: int, finding: bool = False) -> Example:
    """One scene of the train split with its caption and some questions."""
    scene = sample_scene(scene_seed(seed, index), "train")
    rng = random_stream(scene.seed, "train", "language")
    asked = [(PROMPT_CAPTION, caption(scene, rng))]
    found = questions(scene, rng, 4 * FINDING_QUESTIONS if finding else QUESTIONS)
    if finding:
        found = sorted((q for q in found if q.kind in FINDING), key=lambda q: FINDING.index(q.kind))
    asked += [(q.text, q.answer) for q in found[:FINDING_QUESTIONS]]
    picture = Image(draw(scene))
    return Example(
        id=str(scene.seed),
        dialogues=tuple(
            (Message("user", (picture, prompt)), Message("assistant", (answer,)))
            for prompt, answer in asked
        ),
    )


def corpus(seed: int, scenes: int = 4000) -> Iterator[str]:
    """What the tokenizer learns its pieces from."""
    for index in range(scenes):
        for dialogue in example(seed, index).dialogues:
            for message in dialogue:
                yield message.text
    for _ in range(50):
        yield from ("Compress this image in one word:", "Compress this sentence in one word:")
        yield from ("Compress this image and sentence in one word:", "system user assistant")
        yield "You are a helpful assistant."


def look_alike_first(model: CAFe) -> None:
    """Start attention where like attends to like: keys begin as their queries.

    Finding a named thing in a picture is a match between a word and a patch that points the same
    way (`pretrain_tower`). From unrelated queries and keys that match takes longer to appear than
    everything else together. After Trockman and Kolter, "Mimetic Initialization" (2023).
    """
    for layer in model.model.model.language_model.layers:
        attention = layer.self_attn
        with torch.no_grad():
            attention.q_proj.weight.mul_(2)
            attention.k_proj.weight.copy_(attention.q_proj.weight)


def pace(done: float, step: int) -> float:
    """Share of the peak learning rate: a short warm-up, level, then down to zero at the end."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, 0.02 + (1.0 - done) / 0.4)


def optimizers(model: CAFe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the towers, AdamW for everything else."""
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim == 2 and "embed" not in name and "lm_head" not in name
    }
    inside = {id(p) for p in matrices.values()}
    language = [p for name, p in matrices.items() if "language_model" in name]
    sight = [p for name, p in matrices.items() if "language_model" not in name]
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    return [
        torch.optim.Muon(language, lr=MUON_LEARNING_RATE, momentum=0.95, weight_decay=0.01),
        torch.optim.Muon(sight, lr=SIGHT_LEARNING_RATE, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(
            others, lr=ADAM_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30, help="of the language stage")
    parser.add_argument("--tower-minutes", type=float, default=5)
    parser.add_argument(
        "--finding", type=float, nargs=2, default=[0.0, 0.5], help="shares of the time: from, to"
    )
    parser.add_argument("--start", type=Path, help="no first stage: go on from this directory")
    parser.add_argument("--seed", type=int, default=7, help="of scenes and weights")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=200, help="steps")
    arguments = parser.parse_args()

    keep_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    if arguments.start:
        model = CAFe.from_pretrained(arguments.start).train()
    else:
        processor = tiny_processor(corpus(arguments.seed))
        model = CAFe(tiny_model(processor), processor).train()
        look_alike_first(model)
        pretrain_tower(model, arguments.tower_minutes, arguments.workers)
        save(model, arguments.out / "tower")
    both = optimizers(model)
    peaks = [group["lr"] for optimizer in both for group in optimizer.param_groups]
    finding = multiprocessing.Value("b", False)
    loader = DataLoader(
        Batches(model.collator, finding, arguments.seed),
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
        finding.value = arguments.finding[0] <= done < arguments.finding[1]
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
