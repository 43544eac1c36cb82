"""What version 0.1.0 wrote is read, and means the same: see `make.py` beside this file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from cafe import CAFe, Index, Recipe, load_recipe

FIXTURES = Path(__file__).parent / "fixtures"
MADE_IN = "/fixtures"
SAVED_AT = 1_767_225_600 * 10**9  # as in make.py
COLOURS = ("red", "green", "blue", "white", "black", "yellow")
CAPTION = "a {} square in the middle"
PROMPT = "Describe this image."


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the files, which is also the working directory; their old folder is gone."""
    folder = tmp_path / "written"
    shutil.copytree(FIXTURES, folder)
    for model in ("model", "merged"):
        for file in (folder / model).iterdir():
            os.utime(file, ns=(SAVED_AT, SAVED_AT))
    config = folder / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text())
    assert settings["base_model_name_or_path"] == f"{MADE_IN}/model"
    settings["base_model_name_or_path"] = str(folder / "model")
    config.write_text(json.dumps(settings))
    monkeypatch.chdir(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)


def inputs() -> list[Any]:
    shown = [Path(f"data/pictures/{name}.png") for name in COLOURS]
    return [CAPTION.format("red"), PROMPT, *shown, {"text": "red", "image": shown[0]}]


def succeeds(command_line: Any, *arguments: Any) -> str:
    code, output, errors = command_line(*arguments)
    assert code == 0, errors
    return output


def lines(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def same_machine() -> bool:
    """Whether sums are those of the machine that wrote the files, bit for bit."""
    made = json.loads(Path("made.json").read_text())["made_with"]
    known = Path("/proc/cpuinfo")
    processor = known.read_text() if known.is_file() else ""
    same = bool(made["processor"]) and f": {made['processor']}\n" in processor
    return same and made["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["model", "adapter", "merged"])
def test_a_model_embeds_and_answers_as_before(written: Path, command_line: Any, name: str):
    before = np.load(f"{name}.npy")
    core = CAFe.from_pretrained(name, dtype=torch.float32)
    assert np.abs(core.encode(inputs()) - before).max() < 1e-5
    said = json.loads(Path("made.json").read_text())["said"][name]
    for colour, text in zip(COLOURS, said, strict=False):
        asked = (name, PROMPT, "--image", f"data/pictures/{colour}.png", "--max-new-tokens", 12)
        assert succeeds(command_line, "generate", *asked) == text


def test_the_adapter_is_not_the_base_and_its_merged_model_is_the_adapter(written: Path):
    base, adapter, merged = (np.load(f"{name}.npy") for name in ("model", "adapter", "merged"))
    assert np.abs(adapter - base).max() > 1e-2
    assert np.abs(merged - adapter).max() < 1e-4


def under_hub_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Versions before wrote the tower's weights without the hub's prefix."""
    old, new = "vision_tower.", "vision_tower.vision_model."
    return {n if n.startswith(new) else n.replace(old, new): t for n, t in weights.items()}


def test_a_killed_run_goes_on_and_ends_as_the_whole_one(written: Path, command_line: Any):
    here = ("model=model", "output_dir=run", f"data.0.path={written / 'data/train.jsonl'}")
    output = succeeds(command_line, "train", "run/recipe.yaml", "--resume", *here)
    assert "run/model" in output
    before, now = lines("whole/log.jsonl"), lines("run/log.jsonl")
    assert [line["step"] for line in now] == [1, 2, 3, 4]
    assert now[:2] == before[:2]  # their seconds too: these steps were not done again
    for name in ("loss", "contrastive", "language", "learning_rate", "temperature"):
        assert [line[name] for line in now] == pytest.approx(
            [line[name] for line in before], rel=1e-4
        )
    assert len(lines("run/quarantine.jsonl")) == 2  # the record is told again, under its new path
    whole, resumed, base = (
        under_hub_names(load_file(f"{folder}/model.safetensors"))
        for folder in ("whole/model", "run/model", "model")
    )
    assert whole.keys() == resumed.keys()
    assert any(not torch.equal(base[name], resumed[name]) for name in whole)
    if same_machine():
        # The version that wrote them computed the last layer as a whole, which rounds otherwise.
        assert all((whole[name] - resumed[name]).abs().max() < 1e-8 for name in whole)
    # Before the file is replaced: the loaded weights are mapped from it.
    continued = CAFe.from_pretrained("run/model").encode(inputs())
    shutil.copy("whole/model/model.safetensors", "run/model/model.safetensors")
    shutil.copy("whole/model/config.json", "run/model/config.json")
    distance = continued - CAFe.from_pretrained("run/model").encode(inputs())
    assert np.abs(distance).max() < 1e-3


def test_a_quarantine_file_is_read(written: Path):
    (record,) = lines("whole/quarantine.jsonl")
    assert record["source"] == f"{MADE_IN}/data/train.jsonl"
    assert record["record"] == "line 7, id 'silent'"


def test_an_index_is_searched_and_nothing_in_it_is_embedded_again(written: Path, command_line: Any):
    before = json.loads(Path("search.json").read_text())["hits"]
    search = ("search", "pictures.index", "a red square", "--model", "model", "--json")
    found = json.loads(succeeds(command_line, *search))["hits"]
    assert [hit["id"] for hit in found] == [hit["id"] for hit in before]
    for hit, old in zip(found, before, strict=True):
        assert hit.pop("score") == pytest.approx(old.pop("score"), abs=1e-5)
        assert hit.pop("location") == hit["file"], "is new"
        assert {**hit, "file": ""} == {**old, "file": ""}
    output = succeeds(command_line, "index", "model", "data/pictures", "--to", "pictures.index")
    assert "6 rows (6 unchanged)" in output
    again = json.loads(succeeds(command_line, *search))["hits"]
    assert [hit["file"] for hit in again] == [
        str(written / "data/pictures" / hit["id"]) for hit in again
    ]
    some = (*search, "--where", "number < 2")
    assert {hit["id"] for hit in json.loads(succeeds(command_line, *some))["hits"]} == {
        "red.png",
        "green.png",
    }


def test_an_index_takes_what_is_new_and_knows_who_made_it(written: Path, command_line: Any):
    shutil.copy("data/pictures/red.png", "data/pictures/again.png")
    Path("data/pictures/blue.png").unlink()
    output = succeeds(command_line, "index", "model", "data/pictures", "--to", "pictures.index")
    assert "6 rows (1 moved, 5 unchanged, 1 deleted, 1 skipped)" in output
    index = Index.open("pictures.index")
    assert (index.model.name, index.model.dimension) == (f"{MADE_IN}/model", 16)
    code, _, errors = command_line("index", "merged", "data/pictures", "--to", "pictures.index")
    assert code == 2
    assert "other weights" in errors


def test_a_table_of_embeddings_is_searched(written: Path, command_line: Any):
    search = ("search", "mixed.index", "a red square", "--model", "model", "--json", "--top", 1)
    (hit,) = json.loads(succeeds(command_line, *search))["hits"]
    assert (hit["id"], hit["kind"], hit["shard"]) == ("words", "text", 0)
    assert hit["score"] == pytest.approx(1, abs=1e-5)


def test_embedding_shards_are_gone_on_with(written: Path, command_line: Any):
    plan = Path("shards/shards.json")
    source = str(written / "data/mixed.jsonl")
    settings = json.loads(plan.read_text())
    plan.write_text(json.dumps({**settings, "input": source}))
    old = Path("shards/00000.parquet").read_bytes()
    output = succeeds(
        command_line, "embed", "model", source, "--out", "shards", "--shard-size", "2"
    )
    assert "2 embeddings in 1 shards of shards, 2 shards were there" in output
    assert Path("shards/00000.parquet").read_bytes() == old
    parts = [pq.read_table(f"shards/{number:05d}.parquet").to_pylist() for number in range(3)]
    whole = pq.read_table("embeddings.parquet").to_pylist()
    rows = [row for part in parts for row in part]
    assert [row["id"] for row in rows] == [row["id"] for row in whole]
    vectors, expected = ([row["embedding"] for row in table] for table in (rows, whole))
    assert np.allclose(vectors, expected, atol=1e-5)


def test_a_file_of_embeddings_is_as_a_new_one(written: Path, command_line: Any):
    succeeds(command_line, "embed", "model", "data/mixed.jsonl", "--out", "new.parquet")
    old, new = pq.read_table("embeddings.parquet"), pq.read_table("new.parquet")
    assert new.schema.equals(old.schema, check_metadata=True)
    assert new.drop(["embedding"]).equals(old.drop(["embedding"]))
    vectors, expected = (table["embedding"].to_pylist() for table in (new, old))
    assert np.allclose(vectors, expected, atol=1e-5)


def test_results_are_compared_as_before(written: Path, command_line: Any):
    output = succeeds(command_line, "compare", "results/base", "results/tuned")
    assert output == Path("compare.txt").read_text()


def test_a_result_is_kept_and_one_of_another_model_refused(written: Path, command_line: Any):
    task = ("--task", "retrieval", "--data", "data/captions.json", "--json", "results/base")
    assert "retrieval  6 samples (kept)" in succeeds(command_line, "evaluate", "model", *task)
    code, _, errors = command_line("evaluate", "merged", *task)
    assert code == 2
    assert "the result of another model" in errors


NEW_SETTINGS = {"retrieval": {"protocol": "cafe"}}
"""What results say today and did not then."""


@pytest.mark.parametrize("task", ["retrieval", "caption"])
def test_a_result_is_measured_again(written: Path, command_line: Any, task: str):
    succeeds(
        command_line, "evaluate", "model", "--task", task, "--data", "data/captions.json",
        "--json", "new",
    )  # fmt: skip
    old, new = (json.loads(Path(f"{f}/{task}.json").read_text()) for f in ("results/base", "new"))
    assert new.pop("packages").keys() >= old.pop("packages").keys()
    assert new["scores"] == pytest.approx(old["scores"], abs=1e-4)
    assert new.keys() == old.keys()
    assert new["settings"] == {**NEW_SETTINGS.get(task, {}), **old["settings"]}


def test_what_a_failed_evaluation_paid_for_is_used(written: Path, command_line: Any):
    """Its journal has 64 of 66 descriptions; here they are all the reference of their picture."""
    (journal,) = Path("half/.unfinished").glob("*/0.jsonl")
    answers = lines(str(journal))
    assert len(answers) == 64
    told = [
        json.dumps([key, CAPTION.format(COLOURS[number % 6])])
        for number, (key, _) in enumerate(answers)
    ]
    journal.write_text("\n".join(told) + "\n")
    half = ("--data", "data/table.parquet", "--json", "half")
    succeeds(command_line, "evaluate", "model", "--task", "captioning", *half)
    before, now = (
        json.loads(Path(f"{folder}/captioning.json").read_text())["scores"]
        for folder in ("results/base", "half")
    )
    assert before["bleu1"] < 0.1
    assert now["bleu1"] > 0.5
    assert not Path("half/.unfinished").exists()


def holds(new: Any, old: Any) -> bool:
    """Whether every key of `old` has its value; new keys are no difference."""
    if isinstance(old, dict):
        return old.keys() <= new.keys() and all(holds(new[key], old[key]) for key in old)
    if isinstance(old, list):
        return len(old) == len(new) and all(holds(a, b) for a, b in zip(new, old, strict=True))
    return new == old


@pytest.mark.parametrize("name", ["caption", "demo", "mmeb-qwen3-vl-2b-lora"])
def test_a_recipe_and_what_it_was_resolved_to_mean_the_same(written: Path, name: str):
    recipe, resolved = (
        load_recipe(written / "recipes" / f"{name}{end}.yaml") for end in ("", "-resolved")
    )
    assert isinstance(recipe, Recipe)
    old = Path(f"recipes/{name}-resolved.yaml").read_text()
    assert holds(yaml.safe_load(resolved.dump()), yaml.safe_load(old))
    moved = old.replace(MADE_IN, str(written))
    assert holds(yaml.safe_load(recipe.dump()), yaml.safe_load(moved))


@pytest.mark.parametrize("run", ["run", "whole"])
def test_a_recipe_that_a_run_kept_is_read(written: Path, run: str):
    path = written / run / "recipe.yaml"
    recipe = load_recipe(path)
    assert (recipe.model, recipe.schedule.steps, recipe.batch.examples) == ("model", 4, 2)
    assert holds(yaml.safe_load(recipe.dump()), yaml.safe_load(path.read_text()))


def test_hard_negatives_are_trained_on(written: Path, command_line: Any):
    mined = lines("mined.jsonl")
    assert len(mined) == 6
    assert all(len(record["negative_messages"]) == 2 for record in mined)
    recipe = yaml.safe_load(Path("whole.yaml").read_text())
    recipe |= {"output_dir": "tuned", "schedule": {"steps": 1}, "data": [
        {"path": "mined.jsonl", "image_root": "data", "language_loss": False}
    ]}  # fmt: skip
    Path("mined.yaml").write_text(yaml.safe_dump(recipe))
    succeeds(command_line, "train", "mined.yaml")
    (step,) = lines("tuned/log.jsonl")
    assert step["loss"] == step["contrastive"] > 0
    assert not Path("tuned/quarantine.jsonl").exists()


def test_hard_negatives_are_found_as_before(written: Path, command_line: Any):
    near = ("--range", "0-4", "--count", "2", "--relative-margin", "0")
    succeeds(command_line, "mine", "model", "data/captions.json", "--out", "new.jsonl", *near)
    mined = lines("new.jsonl")
    scores = [record.pop("scores") for record in mined]  # which earlier versions did not write,
    assert all(record.pop("id") for record in mined)  # nor these
    assert mined == lines("mined.jsonl")
    assert all(
        len(own) == 1 + len(r["negative_messages"]) for own, r in zip(scores, mined, strict=True)
    )
