"""Two processes (gloo, CPU) have the gradients of one: the joint loss means the same on any number.

Each rank is a real process with DDP; the averaged gradients are compared with those of one process
on the whole batch, in float64. One rank has a chunk without any image.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from helpers.processes import free_port
from helpers.ranks import examples_of, step_of, worker
from helpers.twin import gradients, worst_difference


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 2], ids=["direct", "cached"])
def test_two_processes_have_the_gradients_of_one(chunk: int, tmp_path: Path) -> None:
    port = free_port()
    multiprocessing.spawn(worker, args=(port, chunk, str(tmp_path)), nprocs=2)
    model, contrast, numbers = step_of(-1, 0, wrapped=False)
    expected = gradients(model)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert worst_difference(found["gradients"], expected) < 1e-9
        torch.testing.assert_close(found["temperature"], contrast.log_temperature.grad)
        contrastive, language, tokens, pairs = found["numbers"]
        torch.testing.assert_close(contrastive, numbers.contrastive)
        torch.testing.assert_close(language, numbers.language)
        assert (tokens, pairs) == (numbers.tokens, numbers.pairs)


def test_the_chunk_without_images_is_there(small_model: Any) -> None:
    """Or the test above would not show what it says."""
    parts = examples_of(1)[-2:]
    assert not small_model.collator(parts).vision
    assert dataclasses.replace(small_model.collator, dummy_image=True)(parts).vision
