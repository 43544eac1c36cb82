"""Threads that decode images or encode in parallel change no value and no error."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from cafe.errors import ImageError
from cafe.model.vlm import CAFe
from helpers.images import noise
from helpers.mixed_inputs import INPUTS


def test_images_are_decoded_by_several_threads(small_model: CAFe, tmp_path: Path):
    """With the values, and the names in errors, that one thread gives."""
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        noise(i).save(path)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        several = small_model.encode(paths, batch_size=4)
        torch.set_num_threads(1)
        assert np.abs(small_model.encode(paths, batch_size=4) - several).max() <= 1e-5
        torch.set_num_threads(4)
        paths[4].write_bytes(b"nothing")
        with pytest.raises(ImageError, match=r"input 4: image .*4\.png"):
            small_model.encode(paths)
    finally:
        torch.set_num_threads(before)


def test_threads_that_encode_at_once_do_not_disturb_each_other(small_model: CAFe):
    want = small_model.encode(INPUTS, batch_size=3)
    found: dict[int, np.ndarray] = {}

    def encode(i: int) -> None:
        found[i] = small_model.encode(INPUTS, batch_size=2 + i)

    threads = [threading.Thread(target=encode, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    answer = small_model.generate("hi", max_new_tokens=5)
    for thread in threads:
        thread.join()
    assert answer == small_model.generate("hi", max_new_tokens=5)
    for array in found.values():
        assert np.abs(array - want).max() <= 1e-5
