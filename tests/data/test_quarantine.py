"""The quarantine: each bad record once, and the end when there are too many."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from cafe.data.quarantine import MIN_REJECTED, Quarantine, Skipped, summarized
from cafe.data.read import read_examples
from cafe.errors import DataError


def bad(*numbers: int) -> list[Skipped]:
    return [Skipped("data.json", f"record {n}", f"reason {n}") for n in numbers]


def test_records_are_counted_and_appended_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "run" / "rejected.jsonl"
    quarantine = Quarantine(path)
    quarantine.add([], seen=50)
    assert not path.exists()
    quarantine.add(bad(3), seen=50)
    quarantine.add(bad(7, 9), seen=10)
    assert (quarantine.count, quarantine.seen) == (3, 110)
    assert quarantine.skipped == bad(3, 7, 9)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["record"] for line in lines] == ["record 3", "record 7", "record 9"]
    assert lines[0] == {"source": "data.json", "record": "record 3", "reason": "reason 3"}
    Quarantine(path).add(bad(11), seen=1)  # a second run
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4


@pytest.mark.parametrize(
    "record",
    [
        {"image": "iVBORw0KGgo" * 9000, "caption": "a"},
        {"image": "data:image/png;base64," + "!" * 9000, "caption": "a"},
        {"image": "http://a/" + "b" * 9000, "caption": "a"},
        {"image": "../" * 3000 + "a", "caption": "a"},
        {"id": "i" * 9000, "image": "a.png", "caption": "a"},
        {"conversations": [{"from": "x" * 9000, "value": "a"}]},
        {"anchor": "a", "positive_image": "/" + "x/" * 9000 + "a.png"},
        {"messages": [{"role": "user", "content": [{"type": "y" * 9000}]}]},
    ],
    ids=lambda record: next(iter(record)),
)
def test_a_reason_fits_on_a_line_whatever_the_record_holds(
    tmp_path: Path, record: dict[str, object]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record), encoding="utf-8")
    (skipped,) = read_examples(path).skipped
    assert len(skipped.reason) < 700
    assert len(skipped.record) < 400
    assert "\n" not in str(skipped)
    with pytest.raises(DataError) as raised:
        Quarantine(tmp_path / "rejected.jsonl", threshold=0).add([skipped], seen=1)
    assert len(str(raised.value)) < 1500
    assert (tmp_path / "rejected.jsonl").stat().st_size < 1500


def test_a_record_that_comes_back_every_epoch_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    quarantine = Quarantine(path, threshold=2)
    for _ in range(5):
        quarantine.add(bad(3, 4, 3), seen=10)
    assert quarantine.count == 2
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_a_share_is_exceeded_only_above_it_and_from_ten_records_on(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    few = Quarantine(threshold=0.05)
    few.add(bad(*range(MIN_REJECTED - 1)), seen=MIN_REJECTED - 1)  # all of them, but too few to say
    exactly = Quarantine(threshold=0.05)
    exactly.add(bad(*range(10)), seen=200)
    above = Quarantine(path, threshold=0.05)
    with pytest.raises(DataError) as caught:
        above.add(bad(*range(10)), seen=199)
    message = str(caught.value)
    assert message.startswith("10 of 199 records cannot be used, and 5.0% are allowed")
    assert "data.json, record 0: reason 0; data.json, record 1: reason 1" in message
    assert "reason 2" in message
    assert "reason 3" not in message
    assert message.endswith(f"all of them are in {path}")
    assert len(path.read_text(encoding="utf-8").splitlines()) == 10  # written before the error


def test_a_whole_number_is_the_number_of_records_allowed() -> None:
    quarantine = Quarantine(threshold=2)
    quarantine.add(bad(1, 2), seen=2)
    with pytest.raises(DataError, match=r"3 of 1002 records cannot be used, and 2 are allowed"):
        quarantine.add(bad(3), seen=1000)
    with pytest.raises(DataError):
        Quarantine(threshold=0).add(bad(1), seen=10**6)


def test_good_records_alone_never_end_a_run() -> None:
    quarantine = Quarantine(threshold=0)
    quarantine.add([], seen=10)
    assert quarantine.count == 0


def test_a_file_that_cannot_be_written_is_an_error_that_names_the_record(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be written .*record 3: reason 3"):
        Quarantine(tmp_path / "file" / "rejected.jsonl").add(bad(3), seen=1)


def test_threads_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    quarantine = Quarantine(path, threshold=10**6)

    def work(begin: int) -> None:
        for n in range(begin, begin + 100):
            quarantine.add(bad(n), seen=2)

    threads = [threading.Thread(target=work, args=(100 * t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (quarantine.count, quarantine.seen) == (400, 800)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["record"] for line in lines} == {f"record {n}" for n in range(400)}
    assert len(lines) == 400


def test_many_missing_images_are_said_once_with_the_remedy(tmp_path: Path) -> None:
    lines = [json.dumps({"image": f"{n}.png", "caption": "a cat"}) for n in range(5000)]
    (tmp_path / "a.jsonl").write_text("\n".join(["{", *lines]))
    records = read_examples(tmp_path / "a.jsonl")
    assert len(records.skipped) == 5001
    with pytest.raises(DataError) as caught:
        Quarantine().add(records.skipped, seen=len(records))
    message = str(caught.value)
    assert message.count("no such file") == 0
    assert (
        f"5,000 of them name files that are not in {tmp_path}: image '0.png', image '1.png', "
        "image '2.png', …; put it there, or set image_root to the folder where images are; "
        f"{tmp_path}/a.jsonl, line 1: not JSON"
    ) in message
    assert summarized(records.skipped[:4]) == [str(item) for item in records.skipped[:4]]
