"""Several processes give what one gives, or one clear error, and never wait for the dead."""

from __future__ import annotations

import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cafe.errors import ImageError, WorkerError
from cafe.model import workers
from cafe.model.vlm import CAFe
from helpers.images import noise

TEXTS = [f"a big red cat {'at the top left ' * (i % 5)}number {i}" for i in range(40)]


@pytest.fixture
def model(small_dir: Path) -> CAFe:
    return CAFe.from_pretrained(small_dir, device="cpu")


def no_child_is_left() -> bool:
    return not [c for c in multiprocessing.active_children() if c.name.startswith("SpawnProcess")]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(
    model: CAFe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    noise(9).save(tmp_path / "a.png")
    inputs: list[Any] = [
        *TEXTS,
        noise(1),
        tmp_path / "a.png",
        {"text": "what", "image": [noise(2), noise(3)]},
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a cat"}],
        *(noise(i) for i in range(4, 8)),
    ]
    expected = model.encode(inputs, batch_size=4)
    assert np.abs(expected[:, None] - expected[None]).max(-1)[~np.eye(48, dtype=bool)].min() > 1e-4
    found = model.encode(inputs, batch_size=4, devices=["cpu", "cpu"], show_progress_bar=True)
    assert np.abs(found - expected).max() <= 1e-5
    out, err = capsys.readouterr()
    assert out == ""
    assert "encode" in err
    assert no_child_is_left()


@pytest.mark.slow
def test_a_process_takes_settings_and_names_inputs_as_the_caller_does(model: CAFe, tmp_path: Path):
    from dataclasses import replace

    model.collator = replace(model.collator, max_tokens=80)
    long = ["yes " * 100 + "no", "yes " * 100 + "red"]
    found = model.encode(long, devices=["cpu"], truncate_dim=8, convert_to_tensor=True)
    assert isinstance(found, torch.Tensor)
    assert found.shape == (2, 8)
    assert torch.equal(found[0], found[1]), "both are cut at 80 tokens"
    assert np.abs(found.numpy() - model.encode(long, truncate_dim=8)).max() <= 1e-5
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"input 2: image .*broken\.png"):
        model.encode(["a", noise(1), tmp_path / "broken.png"], devices=["cpu"])
    assert no_child_is_left()


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_without_waiting(model: CAFe):
    killed: list[int | None] = []

    def kill_one() -> None:
        for _ in range(6000):
            for child in multiprocessing.active_children():
                if child.name.startswith("SpawnProcess"):
                    killed.append(child.pid)
                    child.kill()
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(WorkerError, match=r"encodes on cpu has ended \(exit code -9\)"):
        model.encode(TEXTS, batch_size=2, devices=["cpu", "cpu"])
    killer.join()
    assert killed
    assert no_child_is_left()


@pytest.mark.slow
def test_a_model_that_was_changed_since_is_an_error(model: CAFe):
    with torch.no_grad():
        model.model.lm_head.weight.mul_(1.01)
    with pytest.raises(WorkerError, match=r"was changed after it was loaded.*save_pretrained"):
        model.encode(TEXTS[:2], devices=["cpu"])
    assert no_child_is_left()


def test_a_model_that_was_built_and_not_loaded_is_told_what_to_do(small_model: CAFe):
    with pytest.raises(WorkerError, match="need a model that was loaded: use save_pretrained"):
        small_model.encode(TEXTS, devices=["cpu"])


def test_nothing_to_encode_starts_no_process(model: CAFe):
    found = model.encode([], devices=["cpu", "cpu"])
    assert found.shape == (0, model.embedding_dimension)


def test_a_digest_tells_weights_apart_and_not_where_they_are(model: CAFe, small_dir: Path):
    digest = workers.weights_digest(model.model)
    assert digest == workers.weights_digest(CAFe.from_pretrained(small_dir, device="cpu").model)
    with torch.no_grad():
        model.model.model.image_newline[0] += 1e-3
    assert digest != workers.weights_digest(model.model)


@pytest.mark.parametrize(("batches", "count"), [(1, 2), (7, 2), (100, 2), (1000, 3)])
def test_shards_are_whole_batches_in_order(batches: int, count: int):
    made = [[10 * i, 10 * i + 1] for i in range(batches)]
    shards = workers.shards_of(made, count)
    assert [i for shard in shards for i in shard] == [i for batch in made for i in batch]
    assert all(len(shard) % 2 == 0 for shard in shards)
    assert len(shards) >= min(batches, count), "work for every process"
    assert max(map(len, shards)) <= 2 * 16
