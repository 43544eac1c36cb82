"""The slow twin: transformers' own processor and model on one sequence alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cafe.audio import open_audio
from cafe.media import open_image
from cafe.model.rows.render import RenderedSequence
from cafe.model.rows.rows import Rows
from cafe.model.vlm import CAFe
from cafe.types import Audio, Example, Image, Video


@dataclass(frozen=True, slots=True)
class Alone:
    """Tokens [t], positions [axes, t] as the language model used them, states [t, d]."""

    ids: Tensor
    positions: Tensor
    states: Tensor


def plain_inputs(model: CAFe, sequence: RenderedSequence) -> dict[str, Any]:
    images = [open_image(part) for part in sequence.images if isinstance(part, Image)]
    videos = [list(part.source) for part in sequence.images if isinstance(part, Video)]
    shown: dict[str, Any] = {"images": [images]} if images else {}
    sounds = [part for part in sequence.images if isinstance(part, Audio)]
    if sounds:
        rate, seconds = model.family.audio_rate(model.processor), 1e6
        shown["audio"] = [open_audio(sound, rate, seconds) for sound in sounds]
    if videos:
        shown |= {"videos": videos, "do_sample_frames": False}
    inputs = model.processor(
        text=[sequence.text], **shown, add_special_tokens=False, return_tensors="pt"
    )
    dtype = model.model.dtype
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in dict(inputs).items()}


@torch.inference_mode()
def alone(model: CAFe, sequence: RenderedSequence) -> Alone:
    inputs = plain_inputs(model, sequence)
    ids = inputs["input_ids"][0]
    with rotated_positions(model) as seen:
        states = model.model.model(**inputs).last_hidden_state
    return Alone(ids, seen[0][:, 0], states[0])


@contextmanager
def rotated_positions(model: CAFe) -> Iterator[list[Tensor]]:
    """The positions [axes, batch, t] by which the language model rotates, at each call."""
    rotary = next(m for n, m in model.model.named_modules() if n.endswith("_model.rotary_emb"))
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        seen.append(positions if positions.ndim == 3 else positions[None])

    handle = rotary.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


# ------------------------------------------------------------------ rows


@torch.inference_mode()
def run(model: CAFe, examples: Sequence[Example], **settings: Any) -> tuple[Rows, Tensor, Any]:
    chunk = replace(model.collator, **settings)(examples)
    return chunk.rows, model(chunk.rows, chunk.vision), chunk.vision


def path_to(rows: Rows, flat: int) -> tuple[Tensor, Tensor]:
    """The places in a row of the sequence that ends in one token."""
    row, token = divmod(flat, rows.input_ids.shape[1])
    seen = torch.nonzero(rows.subtree_end[row, : token + 1] > token).flatten()
    return torch.full_like(seen, row), seen


def sequences_of(
    model: CAFe, examples: Sequence[Example], rows: Rows
) -> Iterator[tuple[RenderedSequence, int, int]]:
    """Every sequence, the flat index of a token near its end, and how many come after that."""
    collator = model.collator
    sides = [[e.query, e.target, *e.negatives] if e.query else [] for e in examples]
    order = [s for part in (slice(1), slice(1, 2), slice(2, None)) for g in sides for s in g[part]]
    for side, last in zip(order, rows.pooled.tolist(), strict=True):
        assert side is not None
        yield collator.render.embedding(side, "compress"), last, 0
    begin = 0
    for example in examples:
        for dialogue in example.dialogues:
            for sequence in collator.render.answers(dialogue):
                tail = sequence.text[-sequence.labelled :]
                ids = model.processor.tokenizer(tail, add_special_tokens=False)["input_ids"]
                end = begin + len(ids)
                assert rows.label_ids[begin:end].tolist() == ids
                # The very last token predicts nothing, so no index leads to it.
                yield sequence, int(rows.label_source[end - 1]), 1
                begin = end
    assert begin == len(rows.label_ids)


def worst_difference(model: CAFe, examples: Sequence[Example], **settings: Any) -> float:
    """Largest difference of any state of any sequence; tokens and positions must be equal."""
    rows, hidden, _ = run(model, examples, **settings)
    positions = rows.positions if rows.positions.ndim == 3 else rows.positions[None]
    worst = 0.0
    for sequence, last, left_out in sequences_of(model, examples, rows):
        expected = alone(model, sequence)
        kept = len(expected.ids) - left_out
        row, places = path_to(rows, last)
        assert rows.input_ids[row, places].tolist() == expected.ids[:kept].tolist(), sequence.text
        assert rows.depth[row, places].tolist() == list(range(kept))
        used = positions[1:] if len(positions) > 1 else positions
        own = used[:, row, places]
        assert own.tolist() == expected.positions[:, :kept].expand_as(own).tolist()
        worst = max(worst, float((hidden[row, places] - expected.states[:kept]).abs().max()))
    return worst
