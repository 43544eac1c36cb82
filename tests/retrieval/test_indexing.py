"""`build_index` on the small model: an index is made, followed, and kept to one model."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cafe.data.scenes.write import write_scenes
from cafe.errors import CheckpointError, DataError
from cafe.index import Index, ModelFacts
from cafe.index.fingerprint import weights_fingerprint
from cafe.model.checkpoint.adapter import add_adapter, linear_layers, save_adapter
from cafe.model.vlm import CAFe
from cafe.retrieval.indexing import IndexReport, build_index, model_facts, open_model
from cafe.retrieval.sources import list_items
from helpers.images import noise

COUNT = 6


def save_noise(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    noise(seed, 60 + seed, 50).save(path)


def never(name: str) -> CAFe:
    raise AssertionError(f"{name} was loaded")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for i in range(COUNT):
        save_noise(folder / ("deep/er" if i % 2 else ".") / f"{i}.png", i)
    return folder


@pytest.fixture(scope="module")
def loaded(small_dir: Path) -> CAFe:
    return CAFe.from_pretrained(small_dir)


@pytest.fixture(scope="module")
def other_dir(small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model after a step of training."""
    other = CAFe.from_pretrained(small_dir)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    directory = tmp_path_factory.mktemp("other") / "model"
    other.save_pretrained(directory)
    return directory


def test_a_folder_is_indexed_once_and_then_followed(
    photos: Path, loaded: CAFe, tmp_path: Path
) -> None:
    (photos / "broken.jpg").write_bytes(b"not an image")
    (photos / "README.md").write_text("no image")
    save_noise(photos / ".hidden" / "x.png", 1)
    save_noise(tmp_path / "outside.png", 1)
    (photos / "link.png").symlink_to(tmp_path / "outside.png")
    to = tmp_path / "i"
    lines: list[str] = []
    report = build_index(loaded, photos, to, batch_size=4, on_skipped=lines.append)
    assert (report.uri, report.rows, report.approximate) == (str(to), 7, None)
    assert (report.changes.added, len(report.changes.skipped)) == (7, 1)
    assert lines == [f"{one.location}: {one.reason}" for one in report.changes.skipped]
    assert lines[0].startswith("broken.jpg: not an image in a format that Pillow reads")
    assert report.left_out == {".md": 1, "hidden images": 1}
    assert sorted(Index.open(to).known()) == [
        "0.png",
        "2.png",
        "4.png",
        *(f"deep/er/{i}.png" for i in (1, 3, 5)),
        "link.png",
    ]

    for name in ("broken.jpg", "link.png", "2.png"):
        (photos / name).unlink()
    save_noise(photos / "new.png", 9)
    (photos / "0.png").rename(photos / "deep/0.png")
    embedded: list[int] = []

    def counted(values: Sequence[Any]) -> np.ndarray:
        embedded.append(len(values))
        return loaded.encode(values)

    changes = build_index(loaded, photos, to, encode=counted).changes
    assert (changes.added, changes.moved, changes.unchanged, changes.deleted) == (1, 1, 4, 3)
    assert (changes.changed, changes.skipped) == (0, [])
    assert embedded == [1]


def test_what_is_skipped_is_logged_where_nothing_listens(
    photos: Path, loaded: CAFe, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    (photos / "broken.jpg").write_bytes(b"not an image")
    with caplog.at_level(logging.WARNING, "cafe"):
        build_index(loaded, photos, tmp_path / "i")
    (record,) = caplog.records
    assert record.getMessage().startswith("skipped broken.jpg: not an image")
    assert capfd.readouterr().out == ""


def test_the_rows_of_one_folder_are_not_lost_to_another(
    photos: Path, loaded: CAFe, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    save_noise(first / "a.png", 1)
    uri = tmp_path / "i"
    build_index(loaded, first, uri)
    with pytest.raises(DataError, match="whose rows would be deleted"):
        build_index(loaded, photos, uri)
    assert list(Index.open(uri).known()) == ["a.png"]
    first.rename(tmp_path / "moved")
    assert build_index(loaded, tmp_path / "moved", uri).changes.unchanged == 1
    origin = Index.open(uri).origin
    assert origin is not None
    assert origin.source == str(tmp_path / "moved")


def test_another_model_is_refused_before_it_loads_and_without_changes(
    photos: Path, loaded: CAFe, small_dir: Path, other_dir: Path, tmp_path: Path
) -> None:
    uri = tmp_path / "i"
    build_index(loaded, photos, uri)
    before = Index.open(uri).known()
    with pytest.raises(DataError) as error:
        build_index(other_dir, photos, uri, load=never)
    assert "has other weights" in str(error.value)
    assert f"use {small_dir}, or index again" in str(error.value)
    assert f"cafe index {other_dir} {photos} --to NEW_DIR" in str(error.value)
    with pytest.raises(DataError, match="has other weights"):
        build_index(CAFe.from_pretrained(other_dir), photos, uri)
    assert Index.open(uri).known() == before


@pytest.mark.parametrize("source", ["empty", "gone.json", "pairs.jsonl"])
def test_a_source_with_nothing_to_index_is_refused_before_the_model_loads(
    source: str, small_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"query": "a", "positive": "b"}))
    with pytest.raises(DataError) as error:
        build_index(small_dir, tmp_path / source, tmp_path / "i", load=never)
    assert str(tmp_path / source) in str(error.value)
    assert not (tmp_path / "i").exists()


def test_scenes_keep_their_truth_as_columns(loaded: CAFe, tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", 4, seed=0)
    uri = tmp_path / "i"
    build_index(loaded, tmp_path / "scenes" / "truth.jsonl", uri)
    index = Index.open(uri)
    query = np.ones(index.model.dimension, np.float32)
    truth = [json.loads(x) for x in (tmp_path / "scenes" / "truth.jsonl").read_text().splitlines()]
    for line in truth:
        hits = index.search(query, where=f"record_id = '{line['id']}'")
        assert [hit.id for hit in hits] == [line["image"]]
        assert hits[0].metadata["text"] == line["caption"]
        assert hits[0].metadata["background"] == line["background"]
        assert json.loads(hits[0].metadata["objects"]) == line["objects"]
    captions = list_items(str(tmp_path / "scenes" / "captions.json"))
    assert [(item.id, item.text) for item in captions.items] == [
        (line["image"], line["caption"]) for line in truth
    ]


def test_records_without_images_are_texts_and_captions_of_one_image_meet(
    tmp_path: Path,
) -> None:
    save_noise(tmp_path / "a.png", 1)
    lines = [
        json.dumps({"id": "t1", "text": "a red mug", "lang": "en"}),
        json.dumps({"text": "blue"}),
        json.dumps({"image": "a.png", "caption": ["noise", "a cat"], "lang": "en"}),
        json.dumps({"image": "a.png", "caption": "noise"}),
        json.dumps({"image": "../a.png", "caption": "x"}),
        json.dumps({"text": " "}),
        "{not json",
        json.dumps({"query": "a", "positive": "b"}),
    ]
    (tmp_path / "notes.jsonl").write_text("\n".join(lines))
    listing = list_items(str(tmp_path / "notes.jsonl"))
    found = [(i.id, i.kind, i.path, i.text, dict(i.extra)) for i in listing.items]
    assert found == [
        ("t1", "text", None, "a red mug", {"lang": "en"}),
        ("notes-2", "text", None, "blue", {}),
        ("a.png", "image", "a.png", "noise\na cat", {"lang": "en"}),
    ]
    reasons = [problem.reason for problem in listing.skipped]
    for reason, start in zip(
        reasons, ["image '../a.png'", "its text", "", "records of"], strict=True
    ):
        assert reason.startswith(start)


# ---------------------------------------------------------------------- the model's facts


def test_the_facts_of_a_loaded_model_are_those_of_its_name(loaded: CAFe, small_dir: Path) -> None:
    facts = model_facts(loaded)
    assert facts == open_model(str(small_dir), load=lambda name: loaded)[1]
    assert facts.name == str(small_dir)
    assert facts.weights == weights_fingerprint([small_dir])
    assert facts.dimension == 64
    assert ModelFacts.from_json(facts.to_json()) == facts


def test_a_model_that_no_name_loads_again_has_no_facts(small_model: CAFe, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="save it with save_pretrained"):
        model_facts(small_model)
    (tmp_path / "notes.jsonl").write_text('{"text": "a"}')
    with pytest.raises(CheckpointError, match="built in memory"):
        build_index(small_model, tmp_path / "notes.jsonl", tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_an_adapter_is_one_model_however_it_is_loaded(
    loaded: CAFe, small_dir: Path, tmp_path: Path
) -> None:
    vlm = CAFe.from_pretrained(small_dir)
    layers = linear_layers(vlm.model, ("model.language_model.",), ())[:1]
    settings: dict[str, Any] = {"layers": layers, "rank": 2, "alpha": 4, "dropout": 0.0}
    add_adapter(vlm.model, base=str(small_dir), **settings)
    save_adapter(vlm.model, tmp_path / "adapter")
    alone = model_facts(CAFe.from_pretrained(tmp_path / "adapter"))
    assert alone == model_facts(CAFe.from_pretrained(small_dir, adapter=tmp_path / "adapter"))
    assert alone.name == str(tmp_path / "adapter")
    assert alone.weights != model_facts(loaded).weights


def test_of_two_first_runs_at_once_one_waits_and_both_end_right(
    photos: Path, loaded: CAFe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    to = tmp_path / "deep" / "i"
    second_waits = threading.Event()
    caplog.handler.addFilter(lambda record: second_waits.set() or True)

    def slow(values: Sequence[Any]) -> np.ndarray:
        assert second_waits.wait(60)  # the first has made the index and holds it
        return loaded.encode(values)

    begun = threading.Event()

    def first() -> IndexReport:
        return build_index(loaded, photos, to, encode=lambda v: begun.set() or slow(v))

    with caplog.at_level(logging.WARNING, "cafe"), ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        assert begun.wait(60)
        two = pool.submit(build_index, loaded, photos, to, encode=slow)
        reports = [one.result(120), two.result(120)]
    assert "another run writes it; waiting" in caplog.text
    assert [(r.rows, r.changes.added, r.changes.unchanged) for r in reports] == [
        (6, 6, 0),
        (6, 0, 6),
    ]
    assert len(Index.open(to)) == 6
