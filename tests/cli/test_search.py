"""`cafe index` and `cafe search` on the small model: from a folder to hits, judged and answered."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from typer.testing import CliRunner

import cafe.cli.found as found_module
from cafe.cli import app
from cafe.cli.index_items import list_items
from cafe.data.scenes.write import write_scenes
from cafe.errors import DataError
from cafe.index import Index
from cafe.model import inference
from cafe.model.vlm import CAFe

COUNT = 6


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def noise(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (50, 60 + seed, 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True, parents=True)
    PIL.Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for i in range(COUNT):
        noise(folder / ("deep/er" if i % 2 else ".") / f"{i}.png", i)
    return folder


@pytest.fixture(scope="module")
def indexed(small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of pictures with columns beside them, and its index; tests only read them."""
    here = tmp_path_factory.mktemp("indexed")
    lines = []
    for i in range(COUNT):
        noise(here / "photos" / f"{i}.png", i)
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"cat {i}", "year": 2000 + i}))
    (here / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    done = run("index", small_dir, here / "photos", "--to", here / "i")
    assert done.exit_code == 0, done.output
    return here / "photos", here / "i"


def hits_of(*arguments: object) -> list[dict[str, Any]]:
    done = run("search", *arguments, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)["hits"]


# ---------------------------------------------------------------------- cafe index


def test_a_folder_is_indexed_once_and_then_followed(
    photos: Path, small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "broken.jpg").write_bytes(b"not a picture")
    (photos / "README.md").write_text("no picture")
    noise(photos / ".hidden" / "x.png", 1)
    noise(tmp_path / "outside.png", 1)
    (photos / "link.png").symlink_to(tmp_path / "outside.png")
    to = tmp_path / "i"
    done = run("index", small_dir, photos, "--to", to, "--batch-size", 4)
    assert done.exit_code == 0, done.output
    told = done.stdout.splitlines()
    assert told == [f"{to}: 6 rows (6 added, 2 skipped)", "search is exact"]
    assert "skipped broken.jpg: not a picture in a format that Pillow reads" in done.stderr
    assert "skipped link.png: picture 'link.png' is outside" in done.stderr
    index = Index.open(to)
    assert sorted(index.known()) == [
        "0.png",
        "2.png",
        "4.png",
        *(f"deep/er/{i}.png" for i in (1, 3, 5)),
    ]

    for name in ("broken.jpg", "link.png", "2.png"):
        (photos / name).unlink()
    noise(photos / "new.png", 9)
    (photos / "0.png").rename(photos / "deep/0.png")
    embedded: list[int] = []
    real = CAFe.encode

    def counted(self: CAFe, inputs: Any, **options: Any) -> np.ndarray:
        embedded.append(len(inputs))
        return real(self, inputs, **options)

    monkeypatch.setattr(CAFe, "encode", counted)
    done = run("index", small_dir, photos, "--to", to)
    assert done.stdout.splitlines()[0] == (
        f"{to}: 6 rows (1 added, 1 moved, 4 unchanged, 2 deleted)"
    )
    assert embedded == [1]


def test_the_rows_of_one_folder_are_not_lost_to_another(
    photos: Path, indexed: tuple[Path, Path], small_dir: Path, tmp_path: Path
) -> None:
    _, uri = indexed
    done = run("index", small_dir, photos, "--to", uri)
    assert isinstance(done.exception, DataError)
    assert "whose rows would be deleted" in str(done.exception)
    copy, moved = tmp_path / "i", tmp_path / "moved"
    run("index", small_dir, photos, "--to", copy)
    photos.rename(moved)
    done = run("index", small_dir, moved, "--to", copy)
    assert done.stdout.splitlines()[0] == f"{copy}: 6 rows (6 unchanged)"
    assert Path(hits_of(copy, "a cat")[0]["file"]).is_relative_to(moved)


def test_another_model_is_refused_before_it_loads_and_without_changes(
    indexed: tuple[Path, Path], small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, uri = indexed
    other = CAFe.from_pretrained(small_dir)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(CAFe, "from_pretrained", None)
    for done in (
        run("search", uri, "a cat", "--model", tmp_path / "other"),
        run("index", tmp_path / "other", photos, "--to", uri),
    ):
        assert isinstance(done.exception, DataError)
        assert "has other weights" in str(done.exception)
        assert f"use {small_dir}, or index again" in str(done.exception)
        assert f"cafe index {tmp_path / 'other'} {photos} --to NEW_DIR" in str(done.exception)


def test_a_copy_of_the_model_may_search(
    indexed: tuple[Path, Path], small_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_dir, tmp_path / "copy")
    _, uri = indexed
    assert hits_of(uri, "a cat", "--model", tmp_path / "copy") == hits_of(uri, "a cat")


def test_scenes_keep_their_truth_as_columns(small_dir: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", 4, seed=0)
    uri = tmp_path / "i"
    done = run("index", small_dir, tmp_path / "scenes" / "truth.jsonl", "--to", uri)
    assert done.exit_code == 0, done.output
    truth = [json.loads(x) for x in (tmp_path / "scenes" / "truth.jsonl").read_text().splitlines()]
    for line in truth:
        hits = hits_of(uri, "x", "--where", f"record_id = '{line['id']}'")
        assert [hit["id"] for hit in hits] == [line["image"]]
        assert hits[0]["text"] == line["caption"]
        assert hits[0]["background"] == line["background"]
        assert json.loads(hits[0]["objects"]) == line["objects"]
    captions = list_items(str(tmp_path / "scenes" / "captions.json"))
    assert [(item.id, item.text) for item in captions.items] == [
        (line["image"], line["caption"]) for line in truth
    ]


def test_records_without_pictures_are_texts_and_captions_of_one_picture_meet(
    tmp_path: Path,
) -> None:
    noise(tmp_path / "a.png", 1)
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
    reasons = [problem.reason for problem in listing.rejected]
    for reason, start in zip(
        reasons, ["picture '../a.png'", "its text", "", "records of"], strict=True
    ):
        assert reason.startswith(start)


@pytest.mark.parametrize("source", ["empty", "gone.json", "pairs.jsonl"])
def test_a_source_without_anything_is_told_before_the_model_loads(
    source: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"query": "a", "positive": "b"}))
    done = run("index", "no-such-model", tmp_path / source, "--to", tmp_path / "i")
    assert isinstance(done.exception, DataError)
    assert str(tmp_path / source) in str(done.exception)
    assert not (tmp_path / "i").exists()


# ---------------------------------------------------------------------- cafe search


def test_hits_are_those_of_the_models_own_cosines(
    indexed: tuple[Path, Path], small_dir: Path
) -> None:
    photos, uri = indexed
    model = CAFe.from_pretrained(small_dir)
    pictures = model.encode([photos / f"{i}.png" for i in range(COUNT)])
    queries = {
        ("a big cat",): "a big cat",
        ("--image", photos / "3.png"): photos / "3.png",
        ("a big cat", "--image", photos / "3.png"): {
            "text": "a big cat",
            "image": photos / "3.png",
        },
    }
    for arguments, value in queries.items():
        scores = pictures @ model.encode(value)
        hits = hits_of(uri, *arguments, "--top", 4)
        best = np.argsort(-scores)[:4]
        assert [hit["id"] for hit in hits] == [f"{i}.png" for i in best]
        np.testing.assert_allclose([hit["score"] for hit in hits], scores[best], atol=1e-5)
        assert hits[0]["file"] == str(photos / hits[0]["id"])
    assert hits_of(uri, "--image", photos / "3.png", "--top", 1)[0]["id"] == "3.png"


def test_the_table_shows_scores_files_and_captions(indexed: tuple[Path, Path]) -> None:
    photos, uri = indexed
    done = run("search", uri, "a cat", "--where", "year = 2003", "--rerank", 5)
    assert done.exit_code == 0, done.output
    head, line = done.stdout.splitlines()
    assert head.split() == ["score", "match", "posterior", "found", "text"]
    number, score, match, posterior, file, *text = line.split()
    assert (number, file, text) == ("1", str(photos / "3.png"), ["cat", "3"])
    assert -1 <= float(score) <= 1
    assert 0 <= float(match) <= 1
    assert float(posterior) == 1, "there is no other"
    assert run("search", uri, "a cat", "--where", "year = 1900").stdout == "no hits\n"


def test_reranking_orders_the_best_by_cosine_and_judgement_together(
    indexed: tuple[Path, Path], small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, uri = indexed
    # The small model answers nearly alike, and as its embeddings say: let them disagree.
    odds = inference.log_odds
    monkeypatch.setattr(inference, "log_odds", lambda *a: 20 * (odds(*a).mean() - odds(*a)))
    plain = hits_of(uri, "a cat", "--top", COUNT)
    judged = hits_of(uri, "a cat", "--top", COUNT, "--rerank", 4)
    model = CAFe.from_pretrained(small_dir)
    four = [hit["id"] for hit in plain[:4]]
    matches = dict(zip(four, model.score("a cat", [photos / id for id in four]), strict=True))
    cosines = {hit["id"]: hit["score"] for hit in plain}
    weights = {
        id: math.exp(20 * (cosines[id] - plain[0]["score"])) * matches[id] / (1 - matches[id])
        for id in four
    }
    order = [hit["id"] for hit in judged[:4]]
    assert order == sorted(four, key=lambda id: -weights[id])
    assert order not in (four, sorted(four, key=lambda id: -matches[id])), "both count"
    for hit in judged[:4]:
        assert hit["match"] == pytest.approx(matches[hit["id"]], abs=1e-5)
        share = weights[hit["id"]] / sum(weights.values())
        assert hit["posterior"] == pytest.approx(share, rel=1e-3)
    assert judged[4:] == plain[4:]
    assert len(hits_of(uri, "a cat", "--top", 2, "--rerank", 5)) == 2


def test_reranking_pictures_by_a_picture_is_a_clear_error(indexed: tuple[Path, Path]) -> None:
    photos, uri = indexed
    done = run("search", uri, "--image", photos / "1.png", "--rerank", 3)
    assert isinstance(done.exception, DataError)
    assert "a text with pictures, or a picture with texts" in str(done.exception)


def test_an_answer_of_tiny_is_about_the_best_hit_and_says_so(
    indexed: tuple[Path, Path], small_dir: Path
) -> None:
    photos, uri = indexed
    arguments = ("search", uri, "What is this?", "--top", 3, "--answer")
    said = json.loads(run(*arguments, "--json").stdout)
    model = CAFe.from_pretrained(small_dir)
    best = photos / said["hits"][0]["id"]
    alone = model.generate({"text": "What is this?", "image": best})
    assert said["answer"] == {
        "text": f"{alone} [1]",
        "sources": [{"number": 1, "id": best.name, "file": str(best)}],
        "note": found_module.ONE_PICTURE,
    }
    shown = run(*arguments).stdout
    assert "was not trained on several pictures" in shown
    assert f"[1] {best}" in shown


def test_other_models_see_all_hits_as_numbered_pictures(
    indexed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, uri = indexed
    monkeypatch.setattr(found_module, "knows_one_picture", lambda vlm: False)
    asked: list[Any] = []

    def generate(self: CAFe, conversation: Any, **options: Any) -> str:
        asked.append(conversation)
        return "Cats [2], and [3] [3], not [9]."

    real = CAFe.generate
    # The small model can read such a prompt; what it says of it means nothing.
    done = json.loads(run("search", uri, "Cats?", "--top", 3, "--answer", "--json").stdout)
    assert len(done["answer"]["sources"]) >= 1
    monkeypatch.setattr(CAFe, "generate", generate)
    done = json.loads(run("search", uri, "Cats?", "--top", 3, "--answer", "--json").stdout)
    assert real is not generate
    (conversation,) = asked
    parts = conversation[0].content
    files = [hit["file"] for hit in done["hits"]]
    assert [parts[0], parts[3], parts[6]] == ["Picture [1]: ", "Picture [2]: ", "Picture [3]: "]
    assert [str(parts[i].source) for i in (1, 4, 7)] == files
    assert parts[-1].startswith("Cats?\n")
    assert [source["number"] for source in done["answer"]["sources"]] == [2, 3]
    assert done["answer"]["note"] is None


def test_a_picture_that_is_gone_is_told(photos: Path, small_dir: Path, tmp_path: Path) -> None:
    run("index", small_dir, photos, "--to", tmp_path / "i")
    shutil.rmtree(photos)
    assert len(hits_of(tmp_path / "i", "a cat")) == COUNT
    done = run("search", tmp_path / "i", "a cat", "--rerank", 2)
    assert isinstance(done.exception, DataError)
    assert "is gone; update the index" in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "nothing to search for"),
        (("  ",), "nothing to search for"),
        (("--image", "gone.png"), "no such file"),
        (("--image", "0.png", "--answer"), "--answer needs a question"),
        (("x", "--where", "nope = 1"), "write SQL over the columns id, kind, path, text, width"),
    ],
)
def test_what_cannot_be_searched_is_told_before_the_model_loads(
    arguments: tuple[str, ...],
    told: str,
    indexed: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photos, uri = indexed
    monkeypatch.chdir(photos)
    monkeypatch.setattr(CAFe, "from_pretrained", None)
    done = run("search", uri, *arguments)
    assert isinstance(done.exception, DataError)
    assert told in str(done.exception)


def test_no_index_is_told(tmp_path: Path) -> None:
    done = run("search", tmp_path / "none", "a cat")
    assert isinstance(done.exception, DataError)
    assert "make one: cafe index MODEL FOLDER --to" in str(done.exception)
