"""Documents become pages; those that attack their reader become one error, and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cafe.documents import PAGE_PIXELS, StoredPage, is_document, open_document, renderer
from cafe.documents.confined import LARGEST_SIDE
from cafe.errors import DataError, ImageError
from cafe.media import open_image
from cafe.types import Image
from helpers import documents as made

pytest.importorskip("pypdfium2", reason="pip install 'cafe-vlm[documents]'")
pytest.importorskip("fpdf", reason="pip install 'cafe-vlm[dev]'")

TEXTS = ["The first page is about maps.", "The second page\nis about clocks.", "Third"]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_page_is_an_image_with_its_text(tmp_path: Path):
    document = open_document(made.write_pdf(tmp_path / "a.pdf", TEXTS))
    assert document.pages == 3
    pages = [document.page(number) for number in (1, 2, 3)]
    assert [page.text() for page in pages] == TEXTS
    images = [open_image(Image(page)) for page in pages]
    assert all(0.95 * PAGE_PIXELS < image.width * image.height <= PAGE_PIXELS for image in images)
    assert images[0].tobytes() != images[1].tobytes()
    assert min(images[0].convert("L").tobytes()) < 50, "there is ink on it"
    small = open_image(Image(document.page(1, 10_000)))
    assert small.width * small.height <= 10_000
    assert small.height / small.width == pytest.approx(210 / 148, rel=0.02)
    with pytest.raises(ImageError, match="page 4': has no page 4, only 3"):
        document.page(4).read()


def test_its_fingerprint_is_of_the_file_the_number_and_the_size(tmp_path: Path):
    path = made.write_pdf(tmp_path / "a.pdf", TEXTS)
    document = open_document(path)
    copy = open_document(shutil.copy(path, tmp_path / "b.pdf"))
    first = document.page(1)
    assert first.fingerprint == copy.page(1).fingerprint is not None
    changed = open_document(made.write_pdf(path, [*TEXTS, "more"]))
    others = {document.page(2), document.page(1, 500), changed.page(1)}
    assert first.fingerprint not in {page.fingerprint for page in others}
    assert StoredPage(path, 1).fingerprint is None, "nobody has read the file"


def test_what_a_document_is(tmp_path: Path):
    path = made.write_pdf(tmp_path / "A.PDF", ["x"])
    assert is_document(path)
    assert is_document(path.rename(tmp_path / "scan"))
    assert not is_document(written(tmp_path / "other", b"no"))
    assert not is_document(written(tmp_path / "a.txt", b"%PDF-1.7"))
    assert not is_document(tmp_path / "gone")


def test_a_document_that_cannot_be_read_says_why(tmp_path: Path):
    path = made.write_pdf(tmp_path / "locked.pdf", ["secret"], password="word")
    with pytest.raises(DataError, match="is encrypted; save it without its password"):
        open_document(path)
    for content in (b"", b"no PDF", b"%PDF-1.7\n", made.one_page()[:200]):
        with pytest.raises(DataError, match="is not a PDF that can be read"):
            open_document(written(tmp_path / "broken.pdf", content))
    with pytest.raises(DataError, match="has no pages"):
        open_document(written(tmp_path / "empty.pdf", made.without_pages()))
    with pytest.raises(DataError, match="cannot be read"):
        open_document(tmp_path / "gone.pdf")
    many = made.write_pdf(tmp_path / "many.pdf", ["x"] * 12)
    assert open_document(many, 12).pages == 12
    with pytest.raises(DataError, match="has 12 pages, and 11 are the limit; raise max_pages"):
        open_document(many, 11)


@pytest.mark.parametrize("side", [100_000, LARGEST_SIDE + 1])
def test_a_page_that_no_pdf_may_have_is_not_drawn(tmp_path: Path, side: int):
    path = written(tmp_path / "huge.pdf", made.one_page(box=f"0 0 {side} {side}"))
    with pytest.raises(ImageError, match=f"is {side:,} x {side:,} points; sides of 1 to 14,400"):
        open_document(path).page(1).read()


def test_the_largest_page_is_drawn_small(tmp_path: Path):
    path = written(tmp_path / "large.pdf", made.one_page(box=f"0 0 {LARGEST_SIDE} {LARGEST_SIDE}"))
    assert open_image(Image(open_document(path).page(1))).size == (1000, 1000)
    strip = written(tmp_path / "strip.pdf", made.one_page(box="0 0 14400 1"))
    with pytest.raises(ImageError):
        open_image(Image(open_document(strip).page(1)))


def test_scripts_actions_and_embedded_files_stay_what_they_are(tmp_path: Path):
    marker = tmp_path / "ran"
    path = written(tmp_path / "actions.pdf", made.with_actions(marker))
    image = open_image(Image(open_document(path).page(1)))
    assert image.getpixel((image.width // 2, image.height // 2)) == (255, 0, 0)
    assert not marker.exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"actions.pdf"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forms", "streams", "image"])
def test_a_bomb_is_an_error_in_time_and_the_next_page_is_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """It may also be read, if the library sees through it; it may not do more.

    Which limit the nested forms meet first, of time or of memory, depends on the machine.
    """
    monkeypatch.setattr(renderer, "PAGE_SECONDS", 4)
    content = {
        "forms": made.nested_forms,
        "streams": made.nested_streams,
        "image": made.huge_image,
    }[kind]()
    assert len(content) < 100_000
    page = open_document(written(tmp_path / "bomb.pdf", content)).page(1)
    try:
        open_image(Image(page))
        outcome = "read"
    except ImageError as error:
        outcome = str(error)
    stopped = "took more than 4 s" in outcome or "ended the process" in outcome
    assert stopped or (outcome == "read" and kind != "forms"), outcome
    good = open_document(made.write_pdf(tmp_path / "good.pdf", TEXTS))
    assert good.page(1).text() == TEXTS[0]


def test_a_document_that_always_kills_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    document = open_document(made.write_pdf(tmp_path / "a.pdf", ["x"] * 9))
    asked = []

    def killing(self: object, request: object, seconds: float) -> None:
        asked.append(request)
        raise renderer._NoAnswerError("took more than 30 s", late=True)

    monkeypatch.setattr(renderer._Worker, "ask", killing)
    errors = []
    for number in range(1, 10):
        with pytest.raises(ImageError) as caught:
            document.page(number).read()
        errors.append(str(caught.value))
    assert len(asked) == renderer.MAX_KILLS
    assert "not tried: 3 pages of the document" in errors[-1]


def test_a_process_that_died_of_what_it_read_before_is_replaced(tmp_path: Path):
    document = open_document(made.write_pdf(tmp_path / "a.pdf", TEXTS))
    (worker, *_) = renderer._pool._idle
    worker._process.kill()
    worker._process.wait()
    assert document.page(1).text() == TEXTS[0]


def test_several_threads_read_at_once(tmp_path: Path):
    texts = [f"page {number}" for number in range(24)]
    document = open_document(made.write_pdf(tmp_path / "a.pdf", texts))
    found: dict[int, str | None] = {}

    def read(number: int) -> None:
        found[number] = document.page(number + 1).text()

    threads = [threading.Thread(target=read, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(24)] == texts
    assert len(renderer._pool._idle) <= renderer.MAX_WORKERS


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_no_process_outlives_its_parent(tmp_path: Path):
    path = made.write_pdf(tmp_path / "a.pdf", TEXTS)
    program = (
        "import sys, time; from pathlib import Path; from cafe.documents import open_document, "
        "renderer; open_document(Path(sys.argv[1])); "
        "print(renderer._pool._idle[0]._process.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.send_signal(signal.SIGKILL)
    for _ in range(200):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        threading.Event().wait(0.05)
    raise AssertionError("it is still there")
