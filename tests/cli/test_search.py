"""`cafe index` and `cafe search` on the small model: arguments, early errors, printed output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cafe.cli import app
from cafe.errors import DataError
from cafe.model.vlm import CAFe
from cafe.retrieval.search import ONE_IMAGE, Searcher
from helpers.images import noise

COUNT = 6
COLUMNS = ("kind", "path", "text", "width", "height", "year")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def save_noise(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    noise(seed, 60 + seed, 50).save(path)


@pytest.fixture(scope="module")
def indexed(small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of images with columns, and its index; tests only read them."""
    here = tmp_path_factory.mktemp("indexed")
    lines = []
    for i in range(COUNT):
        save_noise(here / "photos" / f"{i}.png", i)
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


def test_a_caption_that_is_read_is_not_left_out(small_dir: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    save_noise(photos / "a.png", 1)
    for name in ("a.txt", "b.txt"):
        (photos / name).write_text("a mug")
    done = run("index", small_dir, photos, "--to", tmp_path / "i")
    assert "left out: 1 file that is not an image (1 .txt)" in done.stdout
    (photos / "b.txt").unlink()
    done = run("index", small_dir, photos, "--to", tmp_path / "i")
    assert "left out" not in done.stdout
    assert [hit["text"] for hit in hits_of(tmp_path / "i", "a mug")] == ["a mug"]


def test_thoughts_are_counted_kept_and_asked_for_again(small_dir: Path, tmp_path: Path) -> None:
    photos, to = tmp_path / "photos", tmp_path / "i"
    for i in range(2):
        save_noise(photos / f"{i}.png", i)
    done = run("index", "tiny", photos, "--to", to, "--think", 5)
    assert done.exit_code == 0, done.output
    image = photos / "1.png"
    hits = hits_of(to, "--image", image)
    assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
    model = CAFe.from_pretrained("tiny", device="cpu")
    assert [hit["generated_caption"] for hit in hits] == model.write_captions(
        [photos / hit["id"] for hit in hits], max_new_tokens=5
    )
    shown = run("search", to, "--image", image).stdout
    assert all(hit["generated_caption"] in shown for hit in hits), "they have no text of their own"
    assert hits_of(to, "--image", image, "--think", 0)[0]["score"] < 0.9999
    assert run("index", "tiny", photos, "--to", to).stdout.startswith(f"{to}: 2 rows (2 unchanged)")
    done = run("index", "tiny", photos, "--to", to, "--think", 6)
    assert "was made with thoughts of at most 5 tokens" in str(done.exception)

    silent = run("index", small_dir, photos, "--to", tmp_path / "silent", "--think", 5)
    assert "2 images embedded alone: the model says nothing of them" in silent.stdout
    silent = run("embed", small_dir, photos, "--out", tmp_path / "s.parquet", "--think", 5)
    assert "2 images embedded alone" in silent.stdout


def test_index_prints_what_changed_and_names_what_was_skipped(
    small_dir: Path, tmp_path: Path
) -> None:
    photos, to = tmp_path / "photos", tmp_path / "i"
    for i in range(COUNT):
        save_noise(photos / f"{i}.png", i)
    (photos / "broken.jpg").write_bytes(b"not an image")
    for name in ("README.md", "a.mp4", "b.MP4"):
        (photos / name).write_text("no image")
    (photos / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"gone-{n}.png"}) + "\n" for n in range(5000))
    )
    done = run("index", small_dir, photos, "--to", to, "--batch-size", 4)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        f"{to}: 6 rows (6 added, 5,001 skipped)",
        "left out: 3 files that are not images (2 .mp4, 1 .md)",
        "search is exact",
    ]
    assert "skipped broken.jpg: not an image in a format that Pillow reads" in done.stderr
    assert [line for line in done.stderr.splitlines() if "gone-" in line] == [
        f"skipped metadata.jsonl, line {n + 1}: image 'gone-{n}.png': no such file in the folder"
        for n in range(3)
    ]
    assert "skipped 4,997 more whose image is not there, 5,000 in all" in done.stderr

    (photos / "metadata.jsonl").unlink()
    for name in ("broken.jpg", "2.png"):
        (photos / name).unlink()
    save_noise(photos / "new.png", 9)
    (photos / "0.png").rename(photos / "zero.png")
    done = run("index", small_dir, photos, "--to", to)
    assert done.stdout.splitlines()[0] == (
        f"{to}: 6 rows (1 added, 1 moved, 4 unchanged, 2 deleted)"
    )

    moved = photos.rename(tmp_path / "moved")
    done = run("index", small_dir, moved, "--to", to)
    assert done.stdout.splitlines()[0] == f"{to}: 6 rows (6 unchanged)"
    assert Path(hits_of(to, "a cat")[0]["file"]).is_relative_to(moved)


def test_another_model_is_refused_before_it_loads(
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


def test_a_source_with_nothing_to_index_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run("index", "no-such-model", tmp_path / "empty", "--to", tmp_path / "i")
    assert isinstance(done.exception, DataError)
    assert str(tmp_path / "empty") in str(done.exception)
    assert not (tmp_path / "i").exists()


# ---------------------------------------------------------------------- cafe search


def test_search_prints_the_hits_of_the_searcher_as_json(
    indexed: tuple[Path, Path], small_dir: Path
) -> None:
    photos, uri = indexed
    searcher = Searcher.open(uri)
    image = photos / "3.png"
    for arguments, query in {
        ("a big cat",): "a big cat",
        ("--image", image): image,
        ("a big cat", "--image", image): {"text": "a big cat", "image": image},
    }.items():
        hits = hits_of(uri, *arguments, "--top", 4)
        expected = searcher.search(query, 4)
        assert [hit["id"] for hit in hits] == [hit.id for hit in expected]
        np.testing.assert_allclose(
            [hit["score"] for hit in hits], [hit.score for hit in expected], atol=1e-5
        )
        assert [hit["file"] for hit in hits] == [hit.file for hit in expected]
        for hit in hits:
            number = int(hit["id"][0])
            assert set(hit) == {"id", "score", "file", "location", *COLUMNS}
            assert (hit["text"], hit["year"]) == (f"cat {number}", 2000 + number)
            assert (hit["width"], hit["height"]) == (60 + number, 50)
    assert hits_of(uri, "a cat", "--model", small_dir) == hits_of(uri, "a cat")


def test_rerank_judges_the_first_hits_and_top_cuts_afterwards(indexed: tuple[Path, Path]) -> None:
    _, uri = indexed
    searcher = Searcher.open(uri)
    expected = searcher.rerank("a cat", searcher.search("a cat", COUNT), 4)
    judged = hits_of(uri, "a cat", "--top", COUNT, "--rerank", 4)
    assert [hit["id"] for hit in judged] == [hit.id for hit in expected]
    for hit, own in zip(judged[:4], expected, strict=False):
        assert hit["match"] == pytest.approx(own.match, abs=1e-5)
        assert hit["posterior"] == pytest.approx(own.posterior, abs=1e-5)
    assert judged[4:] == hits_of(uri, "a cat", "--top", COUNT)[4:]
    likely = hits_of(uri, "a cat", "--rerank", 4, "--rerank-by", "likelihood")
    own = searcher.rerank("a cat", searcher.search("a cat", 4), by="likelihood")
    assert [hit["id"] for hit in likely[:4]] == [hit.id for hit in own]
    assert likely[0]["log_likelihood"] == pytest.approx(own[0].log_likelihood, abs=1e-4)
    assert "match" not in likely[0]
    two = hits_of(uri, "a cat", "--top", 2, "--rerank", 5)
    five = searcher.rerank("a cat", searcher.search("a cat", 5))
    assert [hit["id"] for hit in two] == [hit.id for hit in five[:2]]


def test_hybrid_orders_by_the_words_of_the_captions_too(
    indexed: tuple[Path, Path], small_dir: Path, tmp_path: Path
) -> None:
    _, uri = indexed
    searcher = Searcher.open(uri)
    hits = hits_of(uri, "cat 3", "--hybrid", "--top", 3)
    expected = searcher.search("cat 3", 3, hybrid=True)
    assert [hit["id"] for hit in hits] == [hit.id for hit in expected]
    assert hits_of(uri, "only 4", "--hybrid", "--top", 1)[0]["text"] == "cat 4"
    image = ("--image", indexed[0] / "2.png")
    assert hits_of(uri, "only 4", *image, "--hybrid", "--where", "year = 2004")[0]["id"] == "4.png"
    assert "--hybrid needs words" in str(run("search", uri, *image, "--hybrid").exception)
    save_noise(tmp_path / "bare" / "1.png", 1)
    assert run("index", small_dir, tmp_path / "bare", "--to", tmp_path / "i").exit_code == 0
    refused = run("search", tmp_path / "i", "a cat", "--hybrid")
    assert "has no texts to search by words" in str(refused.exception)


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


def test_an_answer_is_printed_with_its_sources_and_note(
    indexed: tuple[Path, Path], small_dir: Path
) -> None:
    photos, uri = indexed
    arguments = ("search", uri, "What is this?", "--top", 3, "--answer")
    said = json.loads(run(*arguments, "--json").stdout)
    best = photos / said["hits"][0]["id"]
    alone = CAFe.from_pretrained(small_dir).generate({"text": "What is this?", "image": best})
    assert said["answer"] == {
        "text": f"{alone} [1]",
        "sources": [
            {
                "number": 1,
                "id": best.name,
                "file": str(best),
                "page": None,
                "location": str(best),
            }
        ],
        "note": ONE_IMAGE,
    }
    shown = run(*arguments).stdout
    assert "was not trained on several images" in shown
    assert f"[1] {best}" in shown


def test_reranking_images_by_an_image_is_a_clear_error(indexed: tuple[Path, Path]) -> None:
    photos, uri = indexed
    done = run("search", uri, "--image", photos / "1.png", "--rerank", 3)
    assert isinstance(done.exception, DataError)
    assert "a text with images, or an image with texts" in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to search for"),
        (("  ",), "nothing to search for"),
        (("--image", "gone.png"), "no such file"),
        (("--image", "0.png", "--answer"), "--answer needs a question"),
        (("x", "--where", "nope = 1"), "compare the columns id, kind, path, text, width"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_the_model_loads(
    arguments: tuple[str, ...],
    message: str,
    indexed: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photos, uri = indexed
    monkeypatch.chdir(photos)
    monkeypatch.setattr(CAFe, "from_pretrained", None)
    done = run("search", uri, *arguments)
    assert isinstance(done.exception, DataError)
    assert message in str(done.exception)


def test_no_index_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    done = run("search", tmp_path / "none", "a cat")
    assert isinstance(done.exception, DataError)
    assert "make one: cafe index MODEL FOLDER --to" in str(done.exception)
