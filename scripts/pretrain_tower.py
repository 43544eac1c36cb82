"""The first stage of the tiny base: its vision tower learns to see, before it meets language.

As real towers are pretrained before they join a language model, but by supervision: each patch
names the kind and the size of the thing that covers it, and the background. A few minutes of this
teach what an hour of captions did not.

A patch names a kind by pointing where the language model's embedding of that word points, so the
projector speaks the language model's tongue from the start. Without that, the model soon tells
what is at a place, and even after half an hour cannot find a thing by its name. The other heads
are thrown away.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cafe.data.scenes import draw, sample_scene
from cafe.data.scenes.glyphs import ink, sprite
from cafe.data.scenes.kinds import KIND_NAMES
from cafe.data.scenes.world import BACKGROUNDS, PICTURE_PIXELS, Scene, scene_seed
from cafe.model.tiny import PATCH_PIXELS
from cafe.model.vlm import CAFe

SEED = 8
PICTURES = 256
LEARNING_RATE, MUON_LEARNING_RATE = 2e-3, 0.02
LEAST_COVER = 0.12  # of a patch, so that it counts as showing a thing
NOTHING_WEIGHT = 0.3  # most patches show none

_SIDE = PICTURE_PIXELS // PATCH_PIXELS
_KINDS = {name: number for number, name in enumerate(KIND_NAMES, 1)}  # 0: nothing
_GROUNDS = {name: number for number, name in enumerate(BACKGROUNDS)}


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Kind and size (0: nothing, 1: small, 2: big) shown by each patch: int64 [patches] each."""
    owner = np.zeros((PICTURE_PIXELS, PICTURE_PIXELS), dtype=np.int64)
    for number, item in enumerate(scene.objects, 1):
        left, top, right, bottom = item.sprite_box
        mask = ink(sprite(item.kind, item.pixels, item.angle_degrees))
        owner[top:bottom, left:right][mask] = number
    grid = owner.reshape(_SIDE, PATCH_PIXELS, _SIDE, PATCH_PIXELS).transpose(0, 2, 1, 3)
    patches = grid.reshape(_SIDE * _SIDE, -1)
    cover = np.stack([(patches == n).mean(axis=1) for n in range(1, len(scene.objects) + 1)])
    shown = np.where(cover.max(axis=0) >= LEAST_COVER, cover.argmax(axis=0) + 1, 0)
    kinds = np.array([0, *(_KINDS[item.kind] for item in scene.objects)])
    sizes = np.array([0, *(1 + (item.size == "big") for item in scene.objects)])
    return kinds[shown], sizes[shown]


class Pictures(IterableDataset[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """Endless batches: pixels uint8 [b, h, w, 3]; kinds, sizes [b, patches]; backgrounds [b]."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in itertools.count(number, workers):
            pixels, kinds, sizes, grounds = [], [], [], []
            for index in range(batch * PICTURES, (batch + 1) * PICTURES):
                scene = sample_scene(scene_seed(SEED, index), "train")
                kind, size = patch_labels(scene)
                pixels.append(np.asarray(draw(scene)))
                kinds.append(kind)
                sizes.append(size)
                grounds.append(_GROUNDS[scene.background])
            yield (
                torch.from_numpy(np.stack(pixels)),
                torch.from_numpy(np.stack(kinds)),
                torch.from_numpy(np.stack(sizes)),
                torch.tensor(grounds),
            )


def name_directions(model: CAFe) -> Tensor:
    """The language model's (random, fixed) embedding of each kind's name: float [kinds, hidden]."""
    embedding = model.model.get_input_embeddings().weight.detach()
    tokenizer = model.processor.tokenizer
    ids = tokenizer([f" {name}" for name in KIND_NAMES], add_special_tokens=False)["input_ids"]
    return functional.normalize(torch.stack([embedding[i].mean(0) for i in ids]), dim=-1)


def pretrain_tower(model: CAFe, minutes: float, workers: int) -> None:
    """Train the vision tower and the projector of `model` in place."""
    inner = model.model.model
    images = model.processor.image_processor
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (images.image_mean, images.image_std))
    counts = [3, len(_GROUNDS)]
    words = name_directions(model)
    nothing = nn.Parameter(torch.randn(1, words.shape[1]))
    sharpness = nn.Parameter(torch.tensor(2.5))  # of the cosines, as a logarithm
    heads = nn.Linear(model.embedding_dimension, sum(counts))
    own = [nothing, sharpness, *heads.parameters()]
    learned = [*inner.vision_tower.parameters(), *inner.multi_modal_projector.parameters()]
    matrices = [p for p in learned if p.requires_grad and p.ndim == 2 and min(p.shape) > 16]
    inside = {id(p) for p in matrices}
    others = [p for p in learned if p.requires_grad and id(p) not in inside]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW([*others, *own], lr=LEARNING_RATE, betas=(0.9, 0.98)),
    ]
    peaks = (MUON_LEARNING_RATE, LEARNING_RATE)
    weight = torch.ones(len(_KINDS) + 1)
    weight[0] = NOTHING_WEIGHT

    loader = DataLoader(Pictures(), batch_size=None, num_workers=workers, prefetch_factor=4)
    start = time.monotonic()
    for step, (pixels, kinds, sizes, grounds) in enumerate(loader):
        done = (time.monotonic() - start) / 60 / minutes
        if done >= 1:
            break
        pace = min(1.0, (step + 1) / 20) * min(1.0, 0.02 + (1 - done) / 0.4)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * pace
        values = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
        with torch.autocast("cpu", torch.bfloat16):
            seen = inner.vision_tower(values, output_hidden_states=True).hidden_states[-1]
            features = inner.multi_modal_projector(seen)
            size, ground = heads(features).float().split(counts, dim=-1)
        directions = functional.normalize(torch.cat([nothing, words]), dim=-1)
        kind = functional.normalize(features.float(), dim=-1) @ directions.T * sharpness.exp()
        loss = functional.cross_entropy(kind.flatten(0, 1), kinds.flatten(), weight)
        loss = loss + 0.3 * functional.cross_entropy(size.flatten(0, 1), sizes.flatten())
        loss = loss + 0.1 * functional.cross_entropy(ground.mean(1), grounds)
        loss.backward()
        nn.utils.clip_grad_norm_([*learned, *own], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 25 == 0:
            there = kinds > 0
            right = (kind.argmax(-1) == kinds)[there].float().mean()
            print(
                f"tower step {step}, {done:.0%}: loss {float(loss.detach()):.3f}, "
                f"kinds right {float(right):.1%}",
                flush=True,
            )
