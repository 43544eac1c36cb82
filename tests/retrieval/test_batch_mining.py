"""`mine_batches`: from pairs to groups, to the batches of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cafe.data.quarantine import Quarantine
from cafe.errors import CheckpointError, DataError
from cafe.model.vlm import CAFe
from cafe.recipes import load_recipe
from cafe.retrieval.batch_mining import mine_batches
from cafe.training.data import load_data
from cafe.training.loader import Steps
from cafe.training.run import train
from cafe.types import Conversation
from helpers.captioned_noise import COUNT, write_captioned_noise

KINDS, EACH = 6, 8


def encode(conversations: Sequence[Conversation], prompt_name: str) -> np.ndarray:
    """Texts of one kind are near one another: "kind 3, number 5"."""
    rows = []
    for conversation in conversations:
        text = conversation[0].text
        if "broken" in text:
            raise DataError("it cannot be read")
        kind = int(text.split("kind ")[1].split(",")[0])
        rng = np.random.default_rng(sum(map(ord, text)))
        rows.append(np.eye(KINDS)[kind] + 0.05 * rng.normal(size=KINDS))
    array = np.array(rows, dtype=np.float32)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def never(name: str) -> CAFe:
    raise AssertionError(f"{name} was loaded")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    records = [
        {"id": f"{i}", "query": f"q of kind {k}, {i}", "positive": f"t of kind {k}, {i}"}
        for i, k in enumerate(rng.permutation(np.arange(KINDS).repeat(EACH)))
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def kind_of(pairs: Path) -> dict[str, str]:
    records = map(json.loads, pairs.read_text().splitlines())
    return {r["id"]: r["query"].split(",")[0] for r in records}


def mine(pairs: Path, **options: Any) -> Any:
    options = {"rank_range": (0, 7), "max_share": None, "size": 4, **options}
    return mine_batches("x", pairs, encode=encode, load=never, **options)


def test_planted_neighbours_share_a_group_and_a_batch(pairs: Path, tmp_path: Path) -> None:
    report = mine(pairs, out=tmp_path / "groups.jsonl")
    kinds = kind_of(pairs)
    assert sorted(one for group in report.groups for one in group) == sorted(kinds)
    assert all(len({kinds[one] for one in group}) == 1 for group in report.groups)
    assert report.hardest[0] > 0.9 > report.hardest[1] + 0.2
    assert report.neighbours[1] == 3.0
    lines = (tmp_path / "groups.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == report.groups
    recipe = {
        "model": "tiny",
        "output_dir": "out",
        "data": [{"path": "pairs.jsonl", "groups": "groups.jsonl"}],
        "batch": {"examples": 8},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"steps": 12},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(tmp_path / "r.yaml")
    assert loaded.data[0].groups == str(tmp_path / "groups.jsonl")
    data = load_data(loaded, Quarantine())
    for step in range(12):
        numbers = data.plan.plan(step)
        found = [kinds[data.examples[i].id] for i in numbers]
        assert len(found) == 8
        assert all(found.count(kind) in (4, 8) for kind in found), "two whole groups"
        shares = [
            Steps(data, None, None, rank, 3).plan(step).groups  # type: ignore[arg-type]
            for rank in range(3)
        ]
        assert sorted(i for share in shares for group in share for i in group) == sorted(numbers)


def test_it_is_a_function_of_the_seed(pairs: Path) -> None:
    a, b, c = (mine(pairs, seed=seed).groups for seed in (0, 0, 1))
    assert a == b != c


def test_what_cannot_be_embedded_is_left_out_and_said(pairs: Path) -> None:
    record = {"id": "bad", "query": "broken", "positive": "t of kind 1, x"}
    pairs.write_text(pairs.read_text() + "\n" + json.dumps(record))
    said: list[str] = []
    report = mine(pairs, on_skipped=said.append)
    assert said == report.skipped
    assert len(said) == 1
    assert "'bad'" in said[0]
    assert not any("bad" in group for group in report.groups)


def test_bad_arguments_are_told_before_anything_is_embedded(pairs: Path) -> None:
    with pytest.raises(ValueError, match="size is 1"):
        mine(pairs, size=1)
    with pytest.raises(ValueError, match="window is 5-5"):
        mine(pairs, rank_range=(5, 5))
    pairs.write_text(pairs.read_text() + "\n" + pairs.read_text().splitlines()[0])
    with pytest.raises(DataError, match="2 examples have the id"):
        mine(pairs)


def test_the_command_and_a_run_with_its_file(
    small_dir: Path, tmp_path: Path, command_line: Any
) -> None:
    captions, out = write_captioned_noise(tmp_path), tmp_path / "groups.jsonl"
    arguments = ["--out", out, "--range", "0-6", "--max-share", 0, "--batches", 4]
    code, printed, err = command_line("mine", small_dir, captions, *arguments)
    assert (code, "error" in err.lower()) == (0, False), err
    lines = printed.splitlines()
    assert lines[0] == f"{COUNT + 1} pairs in 4 groups of 4"
    assert "its group" in lines[2]
    assert "in random groups" in lines[3]
    entry = yaml.safe_load("\n".join(lines[4:]))
    assert entry == {
        "data": [{"path": str(captions), "groups": str(out)}],
        "batch": {"examples": 4},
    }
    groups = [json.loads(line) for line in out.read_text().splitlines()]
    together = [group for group in groups if {"13", "14"} <= {*group}]
    assert together == [], "two captions of one image are right for one another"
    recipe = {
        **entry,
        "model": str(small_dir),
        "output_dir": str(tmp_path / "out"),
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"steps": 4},
        "log": {"progress": False, "trackers": []},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    train(load_recipe(tmp_path / "r.yaml", ["schedule.steps=2"]))
    out.write_text("".join(json.dumps(group) + "\n" for group in groups[::-1]))
    with pytest.raises(CheckpointError, match=r"the grouping of data\.0 is not what this run"):
        train(load_recipe(tmp_path / "r.yaml"), resume=True)
    without = load_recipe(tmp_path / "r.yaml", ["data.0.groups=null"])
    with pytest.raises(CheckpointError, match=r"data\.\*\.groups was .*true.* and is now null"):
        train(without, resume=True)
