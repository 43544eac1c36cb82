"""Documents in an index: pages are found, cited, followed, and survive a run that is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cafe.cli import app
from cafe.documents import open_document
from cafe.errors import CafeError
from cafe.index import Index
from cafe.model.vlm import CAFe
from cafe.retrieval import documents
from cafe.retrieval.indexing import build_index
from cafe.retrieval.search import Searcher
from helpers import documents as made
from helpers.images import noise

pytest.importorskip("pypdfium2", reason="pip install 'cafe-vlm[documents]'")
pytest.importorskip("fpdf", reason="pip install 'cafe-vlm[dev]'")

REPORT = ["Maps of the northern valley", "The clock tower was built in 1731", "Nothing else"]
QUESTION = "When was the clock tower built?"


@pytest.fixture(scope="module")
def loaded(small_dir: Path) -> CAFe:
    return CAFe.from_pretrained(small_dir)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    made.write_pdf(folder / "deep" / "report.pdf", REPORT)
    made.write_pdf(folder / "one.pdf", ["A single page about bread"])
    noise(1, 60, 50).save(folder / "photo.png")
    return folder


def counting(model: CAFe, counts: list[int]) -> Any:
    def encode(values: Sequence[Any]) -> np.ndarray:
        counts.append(len(values))
        return model.encode(values)

    return encode


def test_pages_and_images_of_one_folder_are_rows(folder: Path, loaded: CAFe, tmp_path: Path):
    record = {"file_name": "one.pdf", "year": 1999}
    (folder / "metadata.jsonl").write_text(json.dumps(record))
    report = build_index(loaded, folder, tmp_path / "i", page_pixels=40_000)
    assert (report.rows, report.changes.added, report.changes.skipped) == (5, 5, [])
    index = Index.open(tmp_path / "i")
    ids = [f"deep/report.pdf#page={n}" for n in (1, 2, 3)]
    assert sorted(index.known()) == [*ids, "one.pdf#page=1", "photo.png"]
    hits = {hit.id: hit.metadata for hit in index.search(loaded.encode("x"), 9)}
    second = hits[ids[1]]
    assert (second["path"], second["page"]) == ("deep/report.pdf", 2)
    assert (second["kind"], second["text"]) == ("image", REPORT[1])
    assert 36_000 < second["width"] * second["height"] <= 40_000
    assert hits["one.pdf#page=1"]["year"] == 1999
    assert "page" not in hits["photo.png"]
    page = open_document(folder / "deep/report.pdf").page(2, 40_000)
    assert index.origin is not None
    assert index.origin.page_pixels == 40_000
    stored = index.stored([ids[1]])[ids[1]].vector
    from cafe.types import Image

    assert stored == pytest.approx(loaded.encode(Image(page)), abs=1e-5)


def test_only_what_changed_is_embedded_again(folder: Path, loaded: CAFe, tmp_path: Path):
    to, counts = tmp_path / "i", []
    build_index(loaded, folder, to, page_pixels=40_000)
    encode = counting(loaded, counts)
    assert build_index(loaded, folder, to, encode=encode).changes.unchanged == 5
    shutil.copy(folder / "deep/report.pdf", folder / "copy.pdf")
    made.write_pdf(folder / "one.pdf", ["Another page", "and one more"])
    changes = build_index(loaded, folder, to, encode=encode).changes
    assert (changes.moved, changes.changed, changes.added, changes.unchanged) == (3, 1, 1, 4)
    assert counts == [2]
    copied = Searcher.open(to, loaded).search(QUESTION, 1, "path = 'copy.pdf'", hybrid=True)
    assert copied[0].hit.metadata["text"] == REPORT[1]
    (folder / "deep/report.pdf").unlink()
    assert build_index(loaded, folder, to, encode=encode).changes.deleted == 3
    changes = build_index(loaded, folder, to, page_pixels=20_000, encode=encode).changes
    assert (changes.changed, changes.unchanged) == (5, 1)


def test_what_cannot_be_read_is_counted_with_the_reason(folder: Path, loaded: CAFe, tmp_path: Path):
    made.write_pdf(folder / "locked.pdf", ["x"], password="word")
    made.write_pdf(folder / "long.pdf", ["x"] * 6)
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 and nothing")
    (folder / "empty.pdf").write_bytes(made.without_pages())
    (folder / "huge.pdf").write_bytes(made.one_page(box="0 0 100000 100000"))
    lines: list[str] = []
    report = build_index(
        loaded, folder, tmp_path / "i", max_pages=5, page_pixels=9000, on_skipped=lines.append
    )
    assert report.rows == 5
    assert len(lines) == len(report.changes.skipped) == 5
    by_file = {line.partition(":")[0]: line for line in lines}
    assert "is encrypted" in by_file["locked.pdf"]
    assert "has 6 pages, and 5 are the limit" in by_file["long.pdf"]
    assert "not a PDF that can be read" in by_file["broken.pdf"]
    assert "has no pages" in by_file["empty.pdf"]
    assert "is 100,000 x 100,000 points" in by_file["huge.pdf, page 1"]


def test_a_question_is_answered_with_file_and_page(folder: Path, small_dir: Path, tmp_path: Path):
    to = tmp_path / "i"
    done = CliRunner().invoke(
        app, ["index", str(small_dir), str(folder), "--to", str(to), "--page-pixels", "40000"]
    )
    assert done.exit_code == 0, done.output
    arguments = ["search", str(to), QUESTION, "--hybrid", "--top", "1", "--answer"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    file = str(folder / "deep/report.pdf")
    (hit,) = found["hits"]
    assert (hit["file"], hit["page"], hit["location"]) == (file, 2, f"{file}, page 2")
    (source,) = found["answer"]["sources"]
    assert (source["file"], source["page"]) == (file, 2)
    assert source["location"] == f"{file}, page 2"
    assert f"[1] {file}, page 2" in CliRunner().invoke(app, arguments).stdout


def test_the_page_that_is_shown_to_the_model_is_the_one_that_was_indexed(
    folder: Path, loaded: CAFe, tmp_path: Path
):
    build_index(loaded, folder, tmp_path / "i", page_pixels=30_000)
    searcher = Searcher.open(tmp_path / "i", loaded)
    (best,) = searcher.search(QUESTION, 1, hybrid=True)
    shown = searcher._part(best)
    assert not isinstance(shown, str)
    page = open_document(folder / "deep/report.pdf").page(2, 30_000)
    assert shown.source.read() == page.read()  # pyright: ignore
    assert searcher.rerank(QUESTION, [best])[0].match is not None


def test_one_document_can_be_indexed(folder: Path, loaded: CAFe, tmp_path: Path):
    build_index(loaded, folder / "deep/report.pdf", tmp_path / "i", page_pixels=9000)
    hit = Searcher.open(tmp_path / "i", loaded).search(QUESTION, 1, hybrid=True)[0]
    assert (hit.page, hit.location) == (2, f"{folder / 'deep/report.pdf'}, page 2")


def test_pages_are_not_deleted_where_nothing_reads_them(
    folder: Path, loaded: CAFe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build_index(loaded, folder, tmp_path / "i", page_pixels=9000)
    monkeypatch.setattr(documents, "documents_readable", lambda: False)
    with pytest.raises(CafeError, match="needs pypdfium2: pip install"):
        build_index(loaded, folder, tmp_path / "i")
    assert len(Index.open(tmp_path / "i")) == 5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("soffice") is None, reason="LibreOffice is not installed")
def test_a_word_file_is_pages(loaded: CAFe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = tmp_path / "files"
    files.mkdir()
    made.write_docx(files / "report.docx", REPORT)
    (files / "broken.docx").write_bytes(b"PK\x03\x04 and nothing")
    report = build_index(loaded, files, tmp_path / "i", page_pixels=9000)
    assert (report.rows, len(report.changes.skipped)) == (3, 1)
    assert "LibreOffice cannot make a PDF" in report.changes.skipped[0].reason
    hit = Searcher.open(tmp_path / "i", loaded).search(QUESTION, 1, hybrid=True)[0]
    assert (hit.id, hit.page) == ("report.docx#page=2", 2)
    monkeypatch.setenv("PATH", "")
    assert build_index(loaded, files, tmp_path / "i").changes.unchanged == 3, "it is kept"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_run_that_is_killed_goes_on_where_it_stopped(
    small_dir: Path, loaded: CAFe, tmp_path: Path
):
    files, to = tmp_path / "files", tmp_path / "i"
    made.write_pdf(files / "long.pdf", [f"page {n} of the book" for n in range(120)])
    command = [sys.executable, "-m", "cafe", "index", str(small_dir), str(files), "--to", str(to)]
    with subprocess.Popen(
        [*command, "--batch-size", "4", "--page-pixels", "40000"], stderr=subprocess.DEVNULL
    ) as process:
        for _ in range(1200):
            index = Index.find(to)
            if index is not None and len(index) >= 8:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    before = len(Index.open(to))
    assert 8 <= before < 120
    counts: list[int] = []
    changes = build_index(loaded, files, to, encode=counting(loaded, counts)).changes
    assert (changes.unchanged, changes.added, sum(counts)) == (before, 120 - before, 120 - before)
    hits = Searcher.open(to, loaded).search("77", 3, hybrid=True)
    assert "long.pdf#page=78" in [hit.id for hit in hits]
