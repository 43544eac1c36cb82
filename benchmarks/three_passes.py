"""The baseline of the trie step: the three passes of the published code.

Each sequence of an example (answer, query, target) is run in its own pass, as a user of
transformers would: processor, right padding, `model(**inputs)`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.nn import functional

from cafe.media import open_image
from cafe.model.vlm import CAFe
from cafe.objective import info_nce
from cafe.types import Example, Image, Message, user

CAPTION = "a big red cat at the top left and a small green car in the centre of the image"


def make_examples(count: int, pixels: int) -> list[Example]:
    """Noise images with different captions of the same number of tokens.

    No pass needs padding, so transformers gives SDPA no mask, its fastest case.
    """
    rng = np.random.default_rng(0)
    examples = []
    for i in range(count):
        noise = rng.integers(0, 255, (pixels, pixels, 3), dtype=np.uint8)
        image, text = Image(PIL.Image.fromarray(noise)), f"{CAPTION} number {i:04d}"
        turns = (
            Message("user", (image, "Describe this image.")),
            Message("assistant", (text,)),
        )
        examples.append(
            Example(id=str(i), query=user(image), target=user(text), dialogues=(turns,))
        )
    return examples


class ThreePasses:
    """The published step: three sequences per example, each in its own pass."""

    def __init__(self, model: CAFe, examples: list[Example], *, zero_images: bool) -> None:
        collator, self.model = model.collator, model
        queries = [collator.render.embedding(e.query, "compress") for e in examples if e.query]
        targets = [collator.render.embedding(e.target, "compress") for e in examples if e.target]
        answers = [s for e in examples for d in e.dialogues for s in collator.render.answers(d)]
        self.query, self.target = self._inputs(queries), self._inputs(targets)
        self.answer = self._inputs(answers)
        self.labels = torch.full_like(self.answer["input_ids"], -100)
        for row, sequence in enumerate(answers):
            tail = sequence.text[-sequence.labelled :]
            n = len(model.processor.tokenizer(tail, add_special_tokens=False)["input_ids"])
            end = int(self.answer["attention_mask"][row].sum())
            self.labels[row, end - n : end] = self.answer["input_ids"][row, end - n : end]
        self.zeros = None
        if zero_images:
            self.zeros = {
                k: torch.zeros_like(v) if v.is_floating_point() else v
                for k, v in self.query.items()
                if k not in ("input_ids", "attention_mask")
            }

    def _inputs(self, sequences: list[Any]) -> dict[str, torch.Tensor]:
        images = [[open_image(i) for i in s.images] for s in sequences if s.images]
        inputs = self.model.processor(
            text=[s.text for s in sequences],
            images=images or None,
            padding=True,
            padding_side="right",
            add_special_tokens=False,
            return_tensors="pt",
        )
        dtype = self.model.model.dtype
        return {
            name: value.to(self.model.device, dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def _last(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        states = self.model.model.model(**inputs, use_cache=False).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        return states[torch.arange(len(states), device=last.device), last].float()

    def __call__(self) -> tuple[float, float]:
        states = self.model.model.model(**self.answer, use_cache=False).last_hidden_state
        logits = self.model.lm_head(states)
        language = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), self.labels[:, 1:].flatten(), ignore_index=-100
        )
        query, target = self._last(self.query), self._last(self.target)
        if self.zeros is not None:
            # No token uses its features: a zero-length slice keeps them in the graph.
            features = self.model.family.image_features(self.model.model.model, self.zeros)
            target = target + torch.cat(features)[:0].sum()
        contrastive = info_nce(query, target)
        (contrastive + language).backward()
        return contrastive.item(), language.item()
