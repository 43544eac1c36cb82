"""What is broken is named, counted and left out, or stops the run before a weight moves."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from cafe.data.quarantine import Quarantine
from cafe.errors import DataError, TrainingError
from cafe.model.rows.chunk import Chunk
from cafe.model.rows.collate import Collator
from cafe.model.vlm import CAFe
from cafe.training.data import load_data
from cafe.training.loader import Steps
from cafe.training.run import train
from helpers.runs import STEPS, equal, make_world, recipe, weights

pytestmark = pytest.mark.slow  # every test trains

POISONED = "000007"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def own_world(world: Path, tmp_path: Path) -> Path:
    """A copy whose data may be broken."""
    return shutil.copytree(world, tmp_path / "world")


def truncate(world: Path, *numbers: int) -> None:
    """Replace images by the first half of a JPEG."""
    for number in numbers:
        path = world / "scenes" / "images" / f"{number:06d}.png"
        PIL.Image.open(path).convert("RGB").save(path, format="JPEG")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_caption(world: Path, number: int, text: str) -> None:
    file = world / "scenes" / "captions.json"
    records = json.loads(file.read_text())
    records[number]["conversations"][1]["value"] = text
    file.write_text(json.dumps(records))


def quarantined(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- not finite


@pytest.fixture
def optimizer_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each step of the optimizer."""
    moves: list[int] = []
    original = torch.optim.AdamW.step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        moves.append(len(moves))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return moves


def poison_images(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """The chunk that holds one example gets an image with a value that no image has."""
    original = Collator.__call__

    def poisoned(self: Collator, examples: Any) -> Chunk:
        chunk = original(self, examples)
        if POISONED in chunk.ids:
            chunk.vision["pixel_values"].view(-1)[0] = value
        return chunk

    monkeypatch.setattr(Collator, "__call__", poisoned)


def bad_chunk(world: Path, out: Path) -> tuple[int, tuple[str, ...]]:
    """(step from 0, ids) of the chunk that holds the poisoned example."""
    wanted = recipe(world, out)
    core = CAFe.from_pretrained(world / "model")
    steps = Steps(load_data(wanted, Quarantine()), core.collator, chunk=2)
    for step in range(STEPS):
        for chunk in steps[step].chunks:
            if POISONED in chunk.ids:
                return step, chunk.ids
    raise AssertionError(f"{POISONED} is in no step")


@pytest.mark.parametrize("weight", ["contrastive_weight=1.0", "contrastive_weight=0.0"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_move_and_names_its_chunk(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer_steps: list[int],
    weight: str,
) -> None:
    """With the contrastive loss the other chunk of the batch is infected, and not to blame."""
    step, ids = bad_chunk(world, tmp_path / "out")
    assert len(ids) == 2
    poison_images(monkeypatch, math.nan)
    with pytest.raises(TrainingError) as stopped:
        train(recipe(world, tmp_path / "out", f"objective.{weight}"))
    text = str(stopped.value)
    assert text.startswith(f"step {step + 1}: the loss is not finite (contrastive ")
    assert f"for the examples {', '.join(map(repr, ids))};" in text
    assert len(optimizer_steps) == step
    assert not (tmp_path / "out" / "model").exists()


def test_a_gradient_that_is_not_finite_stops_too(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer_steps: list[int]
) -> None:
    """A finite loss whose backward overflows, as in bf16."""
    original = torch.Tensor.backward

    def overflowing(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        original(self * math.inf if len(optimizer_steps) == 1 else self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", overflowing)
    with pytest.raises(TrainingError, match=r"step 2: the .* is not finite .* for the examples"):
        train(recipe(world, tmp_path / "out"))
    assert len(optimizer_steps) == 1


# ---------------------------------------------------------------------- broken records


def test_a_truncated_jpeg_is_left_out_of_its_chunk_and_told_once(
    own_world: Path, tmp_path: Path
) -> None:
    truncate(own_world, 5)
    out = tmp_path / "out"
    result = train(recipe(own_world, out, "schedule.epochs=2", "schedule.steps=null"))
    assert [record.step for record in result.records] == list(range(1, 2 * STEPS + 1))
    (line,) = quarantined(out)
    assert line["source"] == f"{own_world}/scenes/captions.json"
    assert line["record"] == "id '000005'"
    assert "000005.png" in line["reason"]
    assert "cannot be decoded" in line["reason"]


def test_with_workers_the_same_is_left_out(own_world: Path, tmp_path: Path) -> None:
    truncate(own_world, 5)
    train(recipe(own_world, tmp_path / "none"))
    train(recipe(own_world, tmp_path / "one", "batch.workers=1"))
    assert quarantined(tmp_path / "none") == quarantined(tmp_path / "one")
    assert equal(weights(tmp_path / "none"), weights(tmp_path / "one"))


def test_records_that_cannot_be_read_are_counted_with_those_that_cannot_be_collated(
    own_world: Path, tmp_path: Path
) -> None:
    truncate(own_world, 5)
    change_caption(own_world, 3, "  ")
    (own_world / "scenes" / "images" / "000009.png").unlink()
    train(recipe(own_world, tmp_path / "out"))
    reasons = {line["record"]: line["reason"] for line in quarantined(tmp_path / "out")}
    assert len(reasons) == 3
    assert "the answer is empty" in reasons["record 4, id '000003'"]
    assert "no such file" in reasons["record 10, id '000009'"]
    assert "cannot be decoded" in reasons["id '000005'"]


def test_too_many_broken_images_end_the_run(own_world: Path, tmp_path: Path) -> None:
    truncate(own_world, *range(20))
    with pytest.raises(DataError, match=r"1\d of 32 records cannot be used"):
        train(recipe(own_world, tmp_path / "out"))


def test_a_share_of_broken_images_borrows_an_example_and_learns_nothing_of_it(
    own_world: Path, tmp_path: Path
) -> None:
    """Or that rank would have nothing to do while the others wait for it."""
    truncate(own_world, *range(16))
    data = load_data(recipe(own_world, tmp_path / "out"), Quarantine())
    collator = CAFe.from_pretrained(own_world / "model").collator
    borrowed = 0
    for step in range(STEPS):
        for rank in range(4):
            share = Steps(data, collator, chunk=1, rank=rank, ranks=4)[step]
            assert len(share.chunks) == 1
            assert int(share.chunks[0].ids[0]) >= 16
            assert share.chunks[0].pairs == 1 - len(share.skipped), "what is borrowed was learned"
            borrowed += len(share.skipped)
    assert borrowed == 16


def test_data_without_any_usable_image_is_one_error(own_world: Path, tmp_path: Path) -> None:
    truncate(own_world, *range(4))
    with pytest.raises(DataError, match=r"no example of this run can be used; .*decoded"):
        train(recipe(own_world, tmp_path / "out", "data.0.limit=4"))


def test_a_caption_beyond_the_context_is_cut_and_its_image_is_not(
    own_world: Path, tmp_path: Path
) -> None:
    change_caption(own_world, 2, "a big red cat at the top left " * 400)
    out = tmp_path / "out"
    result = train(recipe(own_world, out, "schedule.steps=8"))
    assert len(result.records) == 8
    assert not (out / "quarantine.jsonl").exists()

    data = load_data(recipe(own_world, tmp_path / "other"), Quarantine())
    core = CAFe.from_pretrained(own_world / "model")
    collator = replace(core.collator, max_tokens=200)
    long, short = (collator([data.examples[i]]).rows for i in (2, 3))
    image = core.model.config.image_token_id
    counts = [int((rows.input_ids == image).sum()) for rows in (long, short)]
    assert counts[0] == counts[1] > 36
    assert int(long.positions.max()) == 199 > int(short.positions.max())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.0.path=missing.json", "no such file"),
        ("data.0.limit=1", "1 examples, and a batch needs at least 2"),
        ("data.0.mode=chat", "its examples have no pairs"),
    ],
)
def test_data_that_cannot_be_trained_on_is_one_error(
    world: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        train(recipe(world, tmp_path / "out", override, "objective.language_weight=0.0"))
