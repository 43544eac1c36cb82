"""`cafe train` on every layout of data: two steps on a small random model, and exact resume."""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path
from typing import Any, get_args

import datasets
import pytest

from cafe.data.formats import FORMATS
from cafe.data.quarantine import Quarantine
from cafe.errors import DataError, RecipeError
from cafe.media import open_image
from cafe.model.rows.collate import Collator
from cafe.recipes import DataSource, Recipe, load_recipe
from cafe.training.data import load_data
from cafe.training.run import TrainingResult, train
from helpers import layouts
from helpers.layouts import LAYOUTS, TEXTS, add, image_bytes
from helpers.marks import slow
from helpers.models import build_small_model
from helpers.runs import Killed, die_after, equal, weights, without_times

RECIPE = """\
model: {model}
output_dir: {out}
data: [{{path: "{path}"}}]
batch: {{examples: 2, workers: 0}}
optimizer: {{learning_rate: 1e-3}}
schedule: {{steps: 2}}
precision: fp32
log: {{progress: false}}
"""
SHARD_SAMPLES = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "model"
    build_small_model(dropout=0.2).save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def recipe(model: Path, path: Path | str, out: Path, *overrides: str) -> Recipe:
    file = out.with_suffix(".yaml")
    file.write_text(RECIPE.format(model=model, out=out, path=path))
    return load_recipe(file, list(overrides))


def ran(model: Path, path: Path, out: Path, *overrides: str) -> TrainingResult:
    result = train(recipe(model, path, out, *overrides))
    assert [record.step for record in result.records] == [1, 2]
    assert all(math.isfinite(record.loss) for record in result.records)
    assert not (out / "quarantine.jsonl").exists()
    return result


@pytest.mark.parametrize("layout", ["llava", *slow(*list(LAYOUTS)[1:])])
def test_every_layout_trains(model: Path, tmp_path: Path, layout: str) -> None:
    path = LAYOUTS[layout][0](tmp_path / "data")
    result = ran(model, path, tmp_path / "out")
    assert all(record.contrastive > 0 for record in result.records)
    if layout != "sentence_transformers":  # its targets are images, which are no answers
        assert all(record.language > 0 for record in result.records)


@pytest.mark.parametrize(
    ("layout", "override", "silent"),
    [
        ("mmeb", "data.0.language_loss=false", "language"),
        ("llava", "data.0.mode=chat", "contrastive"),
        ("llava", "data.0.mode=pair", None),
        ("openai", "data.0.embedding_prompt=none", None),
        ("column_map", "data.0.columns={image: photo, text: title}", None),
    ],
)
def test_the_keys_of_a_source_reach_the_run(
    model: Path, tmp_path: Path, layout: str, override: str, silent: str | None
) -> None:
    path = getattr(layouts, layout)(tmp_path / "data")
    for record in ran(model, path, tmp_path / "out", override).records:
        learnt = {name for name in ("contrastive", "language") if getattr(record, name) > 0}
        assert learnt == {"contrastive", "language"} - {silent}


def test_max_pixels_reaches_the_images(model: Path, tmp_path: Path) -> None:
    path = layouts.llava(tmp_path / "data")
    seen: dict[str, list[Any]] = {}
    for name, overrides in (("whole", ()), ("small", ("data.0.max_pixels=300",))):
        data = load_data(recipe(model, path, tmp_path / name, *overrides), Quarantine())
        seen[name] = [example.query[0].content[0] for example in data.examples]  # type: ignore[union-attr]
    assert {open_image(image).size for image in seen["whole"]} == {(40, 30)}
    assert {open_image(image).size for image in seen["small"]} == {(20, 15)}


def test_max_rejected_is_the_threshold(model: Path, tmp_path: Path) -> None:
    path = layouts.llava(tmp_path / "data")
    records = json.loads(path.read_text())
    del records[3]["conversations"]
    path.write_text(json.dumps(records))
    assert len(train(recipe(model, path, tmp_path / "out")).records) == 2
    assert "'conversations'" in (tmp_path / "out/quarantine.jsonl").read_text()
    with pytest.raises(DataError, match="1 of 4 records cannot be used, and 0 are allowed"):
        train(recipe(model, path, tmp_path / "strict", "max_rejected=0"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.0.format=lava", "data.0.format is 'lava', expected 'auto'"),
        ("data.0.mode=chat data.0.language_loss=false", "leaves nothing to learn"),
        ("max_rejected=1.0", "max_rejected is 1.0, expected a fraction"),
        ("data.0.max_pixels=0", "data.0.max_pixels is 0"),
    ],
)
def test_a_wrong_key_of_a_source_is_a_recipe_error(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, "data.json", tmp_path / "out", *override.split(" "))


def test_the_recipe_knows_every_format() -> None:
    annotation = DataSource.model_fields["format"].annotation
    assert set(get_args(annotation)) == {"auto", *FORMATS}


def test_hub_names_are_no_paths(tmp_path: Path) -> None:
    assert recipe(tmp_path, "hub:a/b:c", tmp_path / "out").data[0].path == "hub:a/b:c"


# ---------------------------------------------------------------------- archives


@pytest.fixture
def archives(tmp_path: Path) -> str:
    """Two shards, of 6 samples each."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for n in range(SHARD_SAMPLES):
                add(archive, f"{shard}{n}.png", image_bytes(n % 4))
                add(archive, f"{shard}{n}.txt", f"{TEXTS[n % 4]} {shard} {n}".encode())
    return str(tmp_path / "{0..1}.tar")


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Grows by the ids of each chunk of several: the check before training looks at single ones."""
    seen: list[tuple[str, ...]] = []
    original = Collator.__call__

    def noted(self: Collator, examples: Any) -> Any:
        if len(examples) > 1:
            seen.append(tuple(example.id for example in examples))
        return original(self, examples)

    monkeypatch.setattr(Collator, "__call__", noted)
    return seen


@pytest.mark.slow
def test_archives_resume_in_the_middle_of_an_epoch_with_the_same_order(
    model: Path, tmp_path: Path, archives: str, order: list[tuple[str, ...]]
) -> None:
    """12 samples in batches of 2: step 5 of 8 is in the first epoch, step 7 in the second."""
    length = ("schedule.steps=8", "checkpoint.every_steps=1")
    reference, out = tmp_path / "reference", tmp_path / "out"
    train(recipe(model, archives, reference, *length))
    whole = order.copy()
    assert len(whole) == 8
    assert sorted(i for ids in whole[:6] for i in ids) == sorted(
        f"{shard}{n}" for shard in range(2) for n in range(SHARD_SAMPLES)
    )
    order.clear()
    with pytest.raises(Killed):
        train(recipe(model, archives, out, *length), on_step=die_after(5))
    assert order == whole[:5]
    order.clear()
    assert len(list((out / "index").iterdir())) == 2
    train(recipe(model, archives, out, *length), resume=True)
    assert order == whole[4:]  # step 5 died before its checkpoint
    assert without_times(out) == without_times(reference)
    assert equal(weights(out), weights(reference))


def test_a_broken_image_in_an_archive_is_left_out_by_name(model: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for n in range(4):
            add(archive, f"{n}.png", image_bytes(n) if n else b"no image")
            add(archive, f"{n}.txt", TEXTS[n].encode())
    train(recipe(model, tmp_path / "s.tar", tmp_path / "out"))
    (line,) = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["record"] == "id '0'"
    assert f"image '{tmp_path}/s.tar:0.png': not an image" in json.loads(line)["reason"]
