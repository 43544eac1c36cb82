"""An index becomes what its folder is; what did not change costs nothing."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from cafe.errors import DataError
from cafe.index import Index, IndexItem, ModelFacts, Report, sync
from cafe.index.store import only_writer
from cafe.types import Image
from helpers.pixels import FACTS, colour, encode, expected, items_of, paint
from helpers.processes import environment_with_helpers


class Counting:
    """`encode`, and the sizes of the batches it got."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, values: Sequence[Any]) -> np.ndarray:
        self.batches.append(len(values))
        return encode(values)


def run(index: Index, items: Sequence[IndexItem], **options: Any) -> tuple[Report, list[int]]:
    counting = Counting()
    return sync(index, items, counting, **options), counting.batches


def check_equal(index: Index, numbers: dict[str, int]) -> None:
    """`index` holds exactly these images: file name -> colour."""
    stored = index.stored(index.known())
    assert len(index) == len(numbers)
    assert set(stored) == set(numbers)
    for name, number in numbers.items():
        np.testing.assert_allclose(stored[name].vector, expected(number), atol=1e-6)
        assert (stored[name].width, stored[name].height) == (4, 3)


def test_a_folder_is_followed_through_additions_changes_moves_and_deletions(tmp_path: Path):
    folder = tmp_path / "photos"
    paint(folder, range(1, 11))
    index = Index.create(tmp_path / "i", FACTS)
    seen: list[int] = []
    report, batches = run(index, items_of(folder), batch_size=4, progress=seen.append)
    assert report == Report(added=10)
    assert (batches, seen) == ([4, 4, 2], list(range(1, 11)))
    check_equal(index, {f"{i:03d}.png": i for i in range(1, 11)})

    report, batches = run(index, items_of(folder))
    assert (report, batches) == (Report(unchanged=10), [])

    paint(folder, [20])
    (folder / "001.png").unlink()
    (folder / "002.png").rename(folder / "102.png")
    PIL.Image.new("RGB", (4, 3), colour(30)).save(folder / "003.png")
    report, batches = run(index, items_of(folder))
    assert report == Report(added=1, changed=1, moved=1, unchanged=7, deleted=2)
    assert batches == [2], "what moved keeps its vector"
    check_equal(
        index,
        {f"{i:03d}.png": i for i in range(4, 11)} | {"102.png": 2, "003.png": 30, "020.png": 20},
    )


@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_files_that_swap_their_names_swap_their_vectors(tmp_path: Path, batch_size: int):
    folder = tmp_path / "photos"
    paint(folder, [1, 2, 3])
    index = Index.create(tmp_path / "i", FACTS)
    run(index, items_of(folder))
    (folder / "001.png").rename(folder / "x")
    (folder / "002.png").rename(folder / "001.png")
    (folder / "x").rename(folder / "002.png")
    report, _ = run(index, items_of(folder), batch_size=batch_size)
    assert report == Report(changed=2, unchanged=1)
    check_equal(index, {"001.png": 2, "002.png": 1, "003.png": 3})


def test_a_new_caption_is_written_without_a_new_embedding(tmp_path: Path):
    paint(tmp_path / "p", [1, 2])
    index = Index.create(tmp_path / "i", FACTS)
    first, second = items_of(tmp_path / "p")
    run(index, [first, second])
    captioned = IndexItem(
        first.location, first.id, first.source, first.path, "a red one", {"year": 1999}
    )
    report, batches = run(index, [captioned, second])
    assert (report, batches) == (Report(changed=1, unchanged=1), [])
    hit = index.search(expected(1), top=1, where="year = 1999")[0]
    assert (hit.id, hit.metadata["text"], hit.metadata["width"]) == ("001.png", "a red one", 4)


def test_broken_files_are_skipped_and_their_old_rows_deleted(tmp_path: Path):
    folder = tmp_path / "p"
    paint(folder, [1, 2, 3])
    index = Index.create(tmp_path / "i", FACTS)
    run(index, items_of(folder))
    (folder / "002.png").write_bytes(b"not an image")
    (folder / "004.png").write_bytes(b"")
    gone = IndexItem("gone.png", "gone.png", Image(folder / "gone.png"), "gone.png")
    report, _ = run(index, [*items_of(folder), gone])
    assert (report.unchanged, report.deleted) == (2, 1)
    assert [(s.location, s.reason.split(" (")[0]) for s in report.skipped] == [
        ("002.png", "not an image in a format that Pillow reads"),
        ("004.png", "not an image in a format that Pillow reads"),
        ("gone.png", "cannot be read"),
    ]
    check_equal(index, {"001.png": 1, "003.png": 3})


def test_when_nothing_can_be_used_nothing_is_deleted(tmp_path: Path):
    folder = tmp_path / "p"
    paint(folder, [1, 2])
    index = Index.create(tmp_path / "i", FACTS)
    run(index, items_of(folder))
    for file in folder.iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match="no item can be used; the first of 2"):
        run(index, items_of(folder))
    assert len(index) == 2


def test_what_the_model_refuses_is_found_by_halving(tmp_path: Path):
    def refuses(values: Sequence[Any]) -> np.ndarray:
        if "too long" in values:
            raise DataError("longer than the context")
        return encode(values)

    index = Index.create(tmp_path / "i", FACTS)
    texts = [
        IndexItem(f"line {i}", str(i), text="too long" if i in (3, 6) else "x" * i)
        for i in range(1, 8)
    ]
    report = sync(index, texts, refuses)
    assert [(s.location, s.reason) for s in report.skipped] == [
        ("line 3", "longer than the context"),
        ("line 6", "longer than the context"),
    ]
    stored = index.stored(index.known())
    assert sorted(stored) == ["1", "2", "4", "5", "7"]
    np.testing.assert_allclose(stored["7"].vector, np.array([1, 7, 0, 0]) / 50**0.5, atol=1e-6)


def test_an_id_that_occurs_twice_is_skipped(tmp_path: Path):
    index = Index.create(tmp_path / "i", FACTS)
    report, _ = run(index, [IndexItem("a", "1", text="x"), IndexItem("b", "1", text="yy")])
    assert [(s.location, s.reason) for s in report.skipped] == [
        ("b", "id '1' occurs twice; the first is kept")
    ]
    assert len(index) == 1


def test_invalid_text_is_skipped_and_stops_nothing(tmp_path: Path):
    """JSON's escapes can hold half of a pair, and a file's name any bytes."""
    index = Index.create(tmp_path / "i", FACTS)
    items = [
        IndexItem("line 1", "1", text="\ud83d"),
        IndexItem("line 2", "\udcff", text="x"),
        IndexItem("line 3", "3", text="xx", extra={"note": "\ud83d"}),
        IndexItem("line 4", "4", text="xxx"),
    ]
    report, _ = run(index, items)
    assert [
        (s.location, s.reason.split(" contains an unpaired surrogate")[0]) for s in report.skipped
    ] == [
        ("line 1", "text"),
        ("line 2", "id"),
        ("line 3", "note"),
    ]
    assert set(index.known()) == {"4"}


def test_the_uri_of_a_store_is_followed_as_a_folder_is(tmp_path: Path):
    """`file://` takes the way of an object store's URI: LanceDB opens it, no path does."""
    uri = f"file://{tmp_path}/i"
    assert Index.find(uri) is None
    index = Index.create(uri, FACTS)
    paint(tmp_path / "p", range(8))
    report, _ = run(index, items_of(tmp_path / "p"), batch_size=3)
    assert report == Report(added=8)
    (tmp_path / "p" / "003.png").unlink()
    again = Index.open(uri)
    report, batches = run(again, items_of(tmp_path / "p"))
    assert (report, batches) == (Report(unchanged=7, deleted=1), [])
    assert again.optimize(threshold=1) is not None
    check_equal(again, {f"{i:03d}.png": i for i in range(8) if i != 3})
    hits = Index.open(uri, model=FACTS).search(expected(5), top=1, where="width = 4")
    assert [hit.id for hit in hits] == ["005.png"]


def test_large_images_make_small_batches(tmp_path: Path):
    paint(tmp_path / "p", range(1, 6))
    index = Index.create(tmp_path / "i", FACTS)
    _, batches = run(index, items_of(tmp_path / "p"), max_batch_pixels=24)  # two images of 4 x 3
    assert batches == [2, 2, 1]


def test_many_small_writes_are_compacted_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[int] = []
    index = Index.create(tmp_path / "i", FACTS)
    monkeypatch.setattr(index, "compact", lambda: calls.append(len(index)))
    items = [IndexItem(str(i), str(i), text="x" * i) for i in range(1, 9)]
    run(index, items, batch_size=1, compact_every=3)
    assert calls == [3, 6]


def test_a_second_writer_is_refused(tmp_path: Path):
    index = Index.create(tmp_path / "i", FACTS)
    items = [IndexItem("a", "1", text="x")]
    with only_writer(index.uri), pytest.raises(DataError, match="another process is writing"):
        run(index, items)
    run(index, items)
    code = "import sys; from cafe.index.store import only_writer\nwith only_writer(sys.argv[1]): "
    code += "print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, index.uri]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(DataError, match="another process is writing"):
        run(index, items)
    other.kill()
    other.communicate()
    assert run(index, items)[0] == Report(unchanged=1)


def test_an_index_that_is_gone_or_fixed_cannot_be_written(tmp_path: Path):
    with pytest.raises(DataError, match="cannot be written"), only_writer(str(tmp_path / "gone")):
        pytest.fail("written")
    assert not (tmp_path / "gone").exists()
    (tmp_path / ".writer").mkdir()
    with pytest.raises(DataError, match="cannot be written"), only_writer(str(tmp_path)):
        pytest.fail("written")


def test_the_model_s_own_embeddings_are_what_is_searched(tmp_path: Path, small_model: Any):
    rng = np.random.default_rng(0)
    (tmp_path / "p").mkdir()
    for i in range(5):
        pixels = rng.integers(0, 255, (40 + i, 60, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / "p" / f"{i}.png")
    facts = ModelFacts("small", "w", "p", small_model.embedding_dimension)
    index = Index.create(tmp_path / "i", facts, encode=small_model.encode)
    sync(index, items_of(tmp_path / "p"), small_model.encode, batch_size=2)
    alone = small_model.encode([tmp_path / "p" / f"{i}.png" for i in range(5)])
    query = small_model.encode("a big red cat")
    hits = index.search("a big red cat", top=5)
    assert [int(hit.id[0]) for hit in hits] == list(np.argsort(-(alone @ query)))
    np.testing.assert_allclose([h.score for h in hits], np.sort(alone @ query)[::-1], atol=1e-5)
    assert {hit.metadata["height"] for hit in hits} == {40, 41, 42, 43, 44}


@pytest.mark.slow
def test_runs_killed_in_the_middle_lose_at_most_a_batch_and_nothing_twice(tmp_path: Path):
    folder, uri = tmp_path / "photos", tmp_path / "i"
    paint(folder, range(60))
    command = [sys.executable, "-m", "helpers.pixels", str(folder), str(uri)]
    environment = environment_with_helpers()
    chance = random.Random(0)
    rows = 0
    for after in (1, 4, 2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        embedded = 0
        for _ in range(after):
            embedded += int(process.stdout.readline().split()[1])
        time.sleep(chance.random() * 0.05)  # before, during or after the write
        process.send_signal(signal.SIGKILL)
        embedded += sum(int(line.split()[1]) for line in process.stdout if "embedded" in line)
        process.wait()
        assert process.returncode == -signal.SIGKILL
        index = Index.find(uri)
        now = 0 if index is None else len(index)
        assert rows + embedded - 3 <= now <= rows + embedded
        rows = now
    assert 0 < rows < 60
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == f"report {60 - rows} {rows}"
    check_equal(Index.open(uri), {f"{i:03d}.png": i for i in range(60)})
