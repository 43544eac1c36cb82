"""Which parameters a backward reaches: DistributedDataParallel waits for every one it was given.

A parameter that no loss reaches (a norm after the layer that is read) would make DDP fail, so it
is frozen, which changes nothing: without a gradient it never moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import PIL.Image

from cafe.errors import FamilyError
from cafe.model.rows import Chunk
from cafe.model.vlm import CAFe
from cafe.recipes import Objective
from cafe.train.examples import trained_part
from cafe.train.step import TrainingStep
from cafe.types import Example, Image, Message, user


def freeze_unreached(core: CAFe, step: TrainingStep) -> None:
    """Try each kind of chunk once, and freeze the parameters that none of them reaches.

    Raises FamilyError for a parameter that some kinds reach and others do not: there the ranks
    would wait for one another.
    """
    learned = {name: p for name, p in core.named_parameters() if p.requires_grad}
    kinds = 0
    reached = dict.fromkeys(learned, 0)
    for chunk in _kinds_of_chunks(core, step.objective):
        step([chunk])
        kinds += 1
        for name, parameter in learned.items():
            reached[name] += parameter.grad is not None
        core.zero_grad(set_to_none=True)
        step.contrast.zero_grad(set_to_none=True)
    for name, times in reached.items():
        if 0 < times < kinds:
            raise FamilyError(
                f"model type {core.family.model_type!r}: only {times} of {kinds} kinds of chunks "
                f"give {name!r} a gradient, which several processes cannot train; tie it into "
                "every forward, or train with one process"
            )
        learned[name].requires_grad_(times > 0)


def _kinds_of_chunks(core: CAFe, objective: Objective) -> Iterator[Chunk]:
    """Without a picture, with a lone one, with several in one prompt; pair, answer, or both."""
    collator = replace(core.collator, dummy_image=True)
    for count in (0, 1, 2):
        pictures = [Image(PIL.Image.new("RGB", (32, 32), color)) for color in ("red", "blue")]
        query = user(*pictures[:count], "a")
        answered = (*query, Message("assistant", ("b",)))
        pair = Example("pair", query=query, target=user("b"))
        answer = Example("answer", dialogues=(answered,))
        for example in (pair, answer, replace(pair, id="both", dialogues=(answered,))):
            if part := trained_part(example, objective):
                yield collator([part])
