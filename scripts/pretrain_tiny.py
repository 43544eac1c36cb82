"""Pretrain the tiny base: a small real LLaVA-OneVision that answers but cannot retrieve.

    python scripts/pretrain_tiny.py --out runs/tiny-base

Training starts from random weights and uses the language loss only, on captions and questions about
an endless stream of scenes (`cafe.data.scenes`, train split). Every example is one row: the image
tokens once, then one branch per caption and question. All parameters train, with AdamW and bf16
autocast. The loss stays near 0.85 nats for a few hundred steps (the model writes without using the
image) and falls afterwards. `final/` is copied to `src/cafe/model/tiny_base` by hand, with its
card.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cafe.data.scenes import (
    caption,
    draw,
    questions,
    sample_scene,
)
from cafe.data.scenes.world import random_stream, scene_seed
from cafe.memory import keep_memory
from cafe.model.checkpoint.directory import save_checkpoint
from cafe.model.rows.chunk import Chunk
from cafe.model.rows.collate import Collator
from cafe.model.tiny import tiny_model, tiny_processor
from cafe.model.vlm import CAFe
from cafe.objective import next_token_nll
from cafe.types import CAPTION_REQUEST, Example, Image, Message

IMAGES = 64
CAPTIONS, QUESTIONS = 3, 6  # per image; branches are cheap
LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.98), 0.01
WARMUP_STEPS = 30
LEVEL_SHARE = 0.4  # share of the steps before the learning rate decays


class Batches(IterableDataset[list[Chunk]]):
    """Endless batches of new scenes, each collated in chunks of similar length."""

    def __init__(self, collator: Collator, seed: int, chunk: int) -> None:
        self.collator = collator
        self.seed = seed
        self.chunk = chunk

    def __iter__(self) -> Iterator[list[Chunk]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in itertools.count(number, workers):
            examples = [example(self.seed, batch * IMAGES + i) for i in range(IMAGES)]
            examples.sort(key=lambda e: sum(len(m.text) for d in e.dialogues for m in d))
            yield [
                self.collator(examples[i : i + self.chunk]) for i in range(0, IMAGES, self.chunk)
            ]


def example(seed: int, index: int) -> Example:
    """One scene of the train split, with captions and questions."""
    scene = sample_scene(scene_seed(seed, index), "train")
    rng = random_stream(scene.seed, "train", "language")
    captions = dict.fromkeys(caption(scene, rng) for _ in range(CAPTIONS))
    turns = [(CAPTION_REQUEST, text) for text in captions]
    turns += [(q.text, q.answer) for q in questions(scene, rng, QUESTIONS)]
    image = Image(draw(scene))
    return Example(
        id=str(scene.seed),
        dialogues=tuple(
            (Message("user", (image, prompt)), Message("assistant", (answer,)))
            for prompt, answer in turns
        ),
    )


def corpus(seed: int, scenes: int = 4000) -> Iterator[str]:
    """The corpus that the tokenizer is trained on."""
    for index in range(scenes):
        for dialogue in example(seed, index).dialogues:
            for message in dialogue:
                yield message.text
    for _ in range(50):
        yield from ("Compress this image in one word:", "Compress this sentence in one word:")
        yield from ("Compress this image and sentence in one word:", "system user assistant")
        yield "You are a helpful assistant."


def rate_factor(step: int, steps: int) -> float:
    """Factor of the peak learning rate: a short warm-up, constant, then linear decay."""
    remaining = 1 - step / steps
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, 0.02 + remaining / (1 - LEVEL_SHARE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4090)
    parser.add_argument("--seed", type=int, default=7, help="random seed for scenes and weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chunk", type=int, default=64, help="images per chunk")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=1, help="data loader processes; 4 for a GPU")
    parser.add_argument("--save-every", type=int, default=500, help="in steps")
    arguments = parser.parse_args()

    keep_memory()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    processor = tiny_processor(corpus(arguments.seed))
    model = CAFe(tiny_model(processor), processor).to(device).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=LEARNING_RATE,
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    loader = DataLoader(
        Batches(model.collator, arguments.seed, arguments.chunk),
        batch_size=None,
        num_workers=arguments.workers,
        prefetch_factor=8,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = (arguments.out / "log.jsonl").open("a")
    start = time.monotonic()
    for step, chunks in enumerate(itertools.islice(loader, arguments.steps)):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate_factor(step, arguments.steps)
        count = sum(chunk.label_count for chunk in chunks)
        total = torch.zeros((), device=device)
        for chunk in chunks:
            chunk = chunk.to(device)
            with torch.autocast(device.type, torch.bfloat16):
                hidden = model(chunk.rows, chunk.vision).flatten(0, 1)
                states = hidden[chunk.rows.label_source]
                nll, _ = next_token_nll(states, chunk.rows.label_ids, model.lm_head.weight)
            (nll / count).backward()
            total += nll.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            record = {
                "step": step,
                "minutes": round((time.monotonic() - start) / 60, 2),
                "loss": round(float(total) / count, 4),
                "norm": round(float(norm), 3),
            }
            log.write(json.dumps(record) + "\n")
            log.flush()
            print(record, flush=True)
        if step and step % arguments.save_every == 0:
            save(model, arguments.out / f"step-{step}")
    save(model, arguments.out / "final")


def save(model: CAFe, directory: Path) -> None:
    """Save bfloat16 weights: half the size, and the precision of the training."""
    state = {k: v.clone() for k, v in model.model.state_dict().items()}
    model.model.to(torch.bfloat16)
    save_checkpoint(model.model, model.processor, model.collator, directory)
    model.model.to(torch.float32)
    model.model.load_state_dict(state)


if __name__ == "__main__":
    main()
