"""The slow twin of the training step: three separate full-batch passes of the plain model.

As the published code does it (paper §1.5): one pass over the answers, one over the image
embeddings, one over the text embeddings, each with the processor's own tokens and padding, the
logits of every position, and the formula 20·cos, mean of two directions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional

from cafe.media import open_image
from cafe.model.latent import averaged_tokens
from cafe.model.rows.render import RenderedSequence
from cafe.model.vlm import CAFe
from cafe.recipes import Objective
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.matching import Matcher
from cafe.training.step import StepMetrics, TrainingStep
from cafe.types import Example, Image, Message, user


def make_examples(count: int, *, seed: int = 0) -> list[Example]:
    """Pairs of an image and a text of varied length, each with a caption and a question."""
    rng = np.random.default_rng(seed)
    words = ["a", "big", "red", "cat", "at", "the", "top", "left", "yes", "no", "small"]
    examples = []
    for i in range(count):
        pixels = rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)
        image = Image(PIL.Image.fromarray(pixels))
        text = " ".join(rng.choice(words, size=3 + i % 4)) + f" {i}"
        examples.append(
            Example(
                id=f"example-{i}",
                query=user(image),
                target=user(text),
                dialogues=(
                    (Message("user", (image, "Describe this image.")), _answer(text)),
                    (Message("user", (image, "Is it a cat?")), _answer("yes" if i % 2 else "no")),
                ),
            )
        )
    return examples


def _answer(text: str) -> Message:
    return Message("assistant", (text,))


def three_passes(model: CAFe, examples: list[Example], objective: Objective) -> tuple[Any, Any]:
    """(contrastive, language) losses of the batch; the joint loss is backpropagated."""
    collator = model.collator
    answers = [s for e in examples for d in e.dialogues for s in collator.render.answers(d)]

    query = embedded_states(model, [e.query for e in examples])
    target = embedded_states(model, [e.target for e in examples])
    scores = functional.normalize(query) @ functional.normalize(target).T / objective.temperature
    own = torch.arange(len(examples))
    contrastive = (
        functional.cross_entropy(scores, own) + functional.cross_entropy(scores.T, own)
    ) / 2

    inputs = _inputs(model, answers)
    logits = model.lm_head(model.model.model(**inputs).last_hidden_state)
    labels = _labels(model, answers, inputs)
    language = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    loss = objective.contrastive_weight * contrastive + objective.language_weight * language
    loss.backward()
    return contrastive.detach(), language.detach()


def _inputs(model: CAFe, sequences: list[RenderedSequence]) -> dict[str, Tensor]:
    images = [[open_image(i) for i in s.images] for s in sequences if s.images]
    inputs = model.processor(
        text=[s.text for s in sequences],
        images=images or None,
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
    )
    dtype = model.model.dtype
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in dict(inputs).items()}


def last_states(model: CAFe, sequences: list[RenderedSequence]) -> Tensor:
    states, lengths = all_states(model, sequences)
    return states[torch.arange(len(sequences)), lengths - 1]


def embedded_states(model: CAFe, sides: list[Any]) -> Tensor:
    """Embeddings before normalisation: of the last tokens, or the mean of the latent ones."""
    states, lengths = all_states(
        model, [model.collator.render.embedding(side, "compress") for side in sides]
    )
    count = averaged_tokens(model.model.config)
    if not count:
        return states[torch.arange(len(sides)), lengths - 1]
    pairs = zip(states, lengths.tolist(), strict=True)
    return torch.stack([row[end - 1 - count : end - 1].mean(0) for row, end in pairs])


def all_states(model: CAFe, sequences: list[RenderedSequence]) -> tuple[Tensor, Tensor]:
    """States [n, t, d], valid up to each length [n]."""
    inputs = _inputs(model, sequences)
    return model.model.model(**inputs).last_hidden_state, inputs["attention_mask"].sum(1)


def _labels(model: CAFe, sequences: list[RenderedSequence], inputs: dict[str, Tensor]) -> Tensor:
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, sequence in enumerate(sequences):
        end = int(inputs["attention_mask"][row].sum())
        tail = sequence.text[len(sequence.text) - sequence.labelled :]
        count = len(model.processor.tokenizer(tail, add_special_tokens=False)["input_ids"])
        labels[row, end - count : end] = inputs["input_ids"][row, end - count : end]
    return labels


def run_step(
    model: CAFe,
    examples: list[Example],
    objective: Objective,
    chunk: int | None = None,
    sharing: Any = "trie",
    block_cost: int | None = None,
) -> StepMetrics:
    """The step under test, with the batch in chunks of `chunk` examples."""
    collator = replace(model.collator, sharing=sharing, block_cost=block_cost)
    size = chunk or len(examples)
    matching = objective.match_weight > 0
    every_token = objective.multi_vector_weight > 0
    collator = replace(collator, matching=matching, every_token=every_token)
    parts = [collator(examples[i : i + size]) for i in range(0, len(examples), size)]
    matcher = Matcher.of(model) if matching else None
    step = TrainingStep(model, model, ContrastiveLoss(objective), objective, matcher=matcher)
    return step(parts)


def gradients(model: CAFe) -> dict[str, Tensor]:
    """Every parameter's gradient; afterwards there is none."""
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    model.zero_grad()
    return found


def worst_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of any gradient, relative to that gradient's norm.

    Some gradients are zero but for rounding (a key's bias adds the same to every score), so a
    millionth of the whole gradient's norm is added to each denominator.
    """
    assert a.keys() == b.keys()
    whole = float(torch.stack([g.norm() for g in b.values()]).norm())
    return max(float((a[name] - b[name]).norm() / (b[name].norm() + 1e-6 * whole)) for name in a)
