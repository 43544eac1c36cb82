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

import numpy as np
import torch
from pretrain_tower import pixel_values, pretrain_tower
from torch import Tensor, nn
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

MUON_LEARNING_RATE = 0.015
MATCHING_LEARNING_RATE = 0.001
MATCHING = tuple(f"language_model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
ADAM_LEARNING_RATE, EMBEDDING_LEARNING_RATE = 1e-3, 3e-4
EMBEDDING_SCALE = 4.0
WARMUP_STEPS = 30


PICTURES, CHUNK = 32, 16
CAPTIONS, QUESTIONS = 3, 6  # per picture: branches cost little
# Binding names to places is what takes long. A caption teaches it several times in few tokens, and
# a yes or no teaches little: so there is a time of more captions, and of questions that bind.
NAMING_CAPTIONS, NAMING_QUESTIONS = 2, 7
NAMING_KINDS = ("place", "object", "presence", "size")  # in this order, while there are some


class Batches(IterableDataset[list[Chunk]]):
    """Endless batches of fresh scenes, each collated in chunks of like length."""

    def __init__(self, collator: Collator, naming: Any, seed: int) -> None:
        self.collator = collator
        self.seed = seed
        self.naming = naming  # a number that the training process may change

    def __iter__(self) -> Iterator[list[Chunk]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in itertools.count(number, workers):
            examples = [
                example(self.seed, batch * PICTURES + i, bool(self.naming.value))
                for i in range(PICTURES)
            ]
            examples.sort(key=lambda e: sum(len(m.text) for d in e.dialogues for m in d))
            yield [self.collator(examples[i : i + CHUNK]) for i in range(0, PICTURES, CHUNK)]


def example(seed: int, index: int, naming: bool = False) -> Example:
    """One scene of the train split, with captions and questions."""
    scene = sample_scene(scene_seed(seed, index), "train")
    rng = random_stream(scene.seed, "train", "language")
    captions = dict.fromkeys(
        caption(scene, rng) for _ in range(NAMING_CAPTIONS if naming else CAPTIONS)
    )
    asked = [(PROMPT_CAPTION, told) for told in captions]
    found = questions(scene, rng, 4 * NAMING_QUESTIONS if naming else QUESTIONS)
    if naming:
        found = [q for q in found if q.kind in NAMING_KINDS]
        found = sorted(found, key=lambda q: NAMING_KINDS.index(q.kind))[:NAMING_QUESTIONS]
    asked += [(q.text, q.answer) for q in found]
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


@torch.no_grad()
def join(model: CAFe, pixels: Tensor) -> None:
    """Tower and language model meet: what a patch says stays what its words say.

    Finding a named thing in a picture is a match between a word and a patch that points the same
    way (`pretrain_tower`). Three things keep that match alive until the model uses it; without
    them it is gone within 100 steps, and comes back slowly:
    1. Keys begin as queries, so that like attends to like (Trockman and Kolter, "Mimetic
       Initialization", 2023).
    2. Embeddings are large against what AdamW moves them by in a step.
    3. Patches are as long as words; the tower leaves them 400 times longer, where their gradients
       are nothing and the layers' updates too.
    """
    language = model.model.model.language_model
    for layer in language.layers:
        layer.self_attn.q_proj.weight.mul_(2)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    words = language.embed_tokens.weight
    words.mul_(EMBEDDING_SCALE)
    inner = model.model.model
    seen = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    last = inner.multi_modal_projector.linear_2
    # A tenth by the first layer, whose inputs to GELU are so large that a tenth of them bends
    # the patches by less than 1 % (least cosine 0.99); so no layer's weights become tiny.
    for parameter in inner.multi_modal_projector.linear_1.parameters():
        parameter.mul_(0.1)
    scale = words.norm(dim=-1).mean() / inner.multi_modal_projector(seen).norm(dim=-1).mean()
    for parameter in last.parameters():
        parameter.mul_(scale)
    inner.image_newline.mul_(words.std() / inner.image_newline.std())


def sight_of(model: CAFe) -> list[nn.Parameter]:
    """What sees: the tower and the projector. It rests while the language model learns to look.

    Moved by what the language model does not know yet, it forgets within 100 steps what the first
    stage taught it.
    """
    inner = model.model.model
    return [*inner.vision_tower.parameters(), *inner.multi_modal_projector.parameters()]


def pace(done: float, step: int) -> float:
    """Share of the peak learning rate: a short warm-up, level, then down to zero at the end."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, 0.02 + (1.0 - done) / 0.6)


def optimizers(model: CAFe) -> list[torch.optim.Optimizer]:
    """Muon for the language model's matrices, AdamW for everything else that learns.

    Muon's step is as long for noise as for signal, and would undo `join` before
    anything uses it: the first layer's queries and keys move slowly.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in ("matching", "inside", "others")}
    groups["embedding"] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 2 and "embed" not in name:
            kind = "matching" if name.endswith(MATCHING) else "inside"
        else:
            kind = "embedding" if "embed_tokens" in name else "others"
        groups[kind].append(parameter)
    muon = (("inside", MUON_LEARNING_RATE), ("matching", MATCHING_LEARNING_RATE))
    adam = [
        {"params": groups["embedding"], "lr": EMBEDDING_LEARNING_RATE},
        {"params": groups["others"], "lr": ADAM_LEARNING_RATE},
    ]
    return [
        *(
            torch.optim.Muon(groups[name], lr=rate, momentum=0.95, weight_decay=0.01)
            for name, rate in muon
        ),
        torch.optim.AdamW(adam, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=34, help="of the language stage")
    parser.add_argument("--tower-minutes", type=float, default=6)
    parser.add_argument(
        "--naming", type=float, default=0.5, help="share of the time that is mostly captions"
    )
    parser.add_argument("--tower", type=Path, help="the first stage's result, from this directory")
    parser.add_argument("--start", type=Path, help="go on from this directory, no first stage")
    parser.add_argument("--seed", type=int, default=7, help="of scenes and weights")
    parser.add_argument("--peak", type=float, default=1.0, help="scale of the learning rates")
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
        if arguments.tower:
            model = CAFe.from_pretrained(arguments.tower).train()
        else:
            processor = tiny_processor(corpus(arguments.seed))
            model = CAFe(tiny_model(processor), processor).train()
            pretrain_tower(model, arguments.tower_minutes, arguments.workers)
            save(model, arguments.out / "tower")
        scenes = [draw(sample_scene(scene_seed(arguments.seed, i), "train")) for i in range(64)]
        join(model, pixel_values(model, np.stack([np.asarray(scene) for scene in scenes])))
    for parameter in sight_of(model):
        parameter.requires_grad_(False)
    both = optimizers(model)
    peaks = [arguments.peak * group["lr"] for optimizer in both for group in optimizer.param_groups]
    naming = multiprocessing.Value("b", True)
    loader = DataLoader(
        Batches(model.collator, naming, arguments.seed),
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
        naming.value = done < arguments.naming
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
