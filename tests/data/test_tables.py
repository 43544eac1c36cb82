"""How records are stored: archives, tables, and what is said of broken ones."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import datasets
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import layouts
from layouts import PICTURE, TEXTS, add, hugging_face_struct, picture_bytes, write_json

from cafe.data.read import read_examples
from cafe.data.records import Reading
from cafe.data.tables import open_table, tar
from cafe.data.tables.arrow import dataset_table
from cafe.data.tables.tar import FileSlice, Sample, expand, scan
from cafe.errors import DataError, ImageError
from cafe.media import fitting_size, open_image
from cafe.types import Example, Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def first_picture(example: Example) -> Image:
    assert example.query is not None
    (picture,) = example.query[0].content
    assert isinstance(picture, Image)
    return picture


# ---------------------------------------------------------------------- archives


def test_braces_by_hand() -> None:
    assert expand("a.tar") == ["a.tar"]
    assert expand("s-{08..11}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]
    assert expand("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]


def test_a_shard_is_scanned_into_samples(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "dir/a.b.png", b"12345")
        add(archive, "dir/a.txt", "é".encode())
        add(archive, "dir/a.cls", b"3")
        add(archive, "dir/b.JPG", b"678")
    first, second = scan(path)
    assert (first.key, first.texts) == ("dir/a", {"txt": "é"})
    assert [name for name, _, _ in first.pictures] == ["dir/a.b.png"]
    assert second == Sample("dir/b", second.pictures, {})
    content = path.read_bytes()
    for sample, expected in ((first, b"12345"), (second, b"678")):
        ((member, offset, size),) = sample.pictures
        assert content[offset : offset + size] == expected
        assert FileSlice(path, member, offset, size).read() == expected


def test_conversations_in_an_archive_show_its_pictures(tmp_path: Path) -> None:
    """The JSON's own picture name is of a place before packing."""
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for n, record in enumerate(layouts.llava_records()):
            add(archive, f"{n}.png", picture_bytes(n))
            add(archive, f"{n}.json", json.dumps(record).encode())
    records = read_examples(tmp_path / "s.tar")
    assert records.format == "llava"
    assert [e.id for e in records.examples] == [f"llava-{n}" for n in range(4)]
    assert open_image(first_picture(records.examples[2])).getpixel((0, 0)) == (0, 0, 255)


def test_the_index_is_kept_and_made_anew_when_the_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, index = layouts.webdataset(tmp_path / "data"), tmp_path / "run/index"
    scanned: list[str] = []
    monkeypatch.setattr(tar, "scan", lambda p: scanned.append(p.name) or scan(p))

    def ids() -> list[str]:
        return [e.id for e in read_examples(path, index=index).examples]

    before = ids()
    assert before == [f"{n:09d}" for n in range(4)]
    assert scanned == ["00000.tar", "00001.tar"]
    assert ids() == before
    assert len(scanned) == 2
    with tarfile.open(tmp_path / "data/00001.tar", "w") as archive:
        add(archive, "new.png", picture_bytes(0))
        add(archive, "new.txt", b"a cat")
    assert ids() == [*before[:2], "new"]
    assert scanned[2:] == ["00001.tar"]
    for file in index.iterdir():
        file.write_text("{")  # cut: as good as none
    assert ids() == [*before[:2], "new"]
    assert len(scanned) == 5


def shard(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for n in range(4):
            add(archive, f"{n}.jpg", picture_bytes(n, "JPEG"))
            add(archive, f"{n}.txt", TEXTS[n].encode())
    return path


def test_a_corrupt_shard_is_an_error_wherever_it_is_broken(tmp_path: Path) -> None:
    """Cut or overwritten at any block: never fewer samples without a word."""
    path = shard(tmp_path / "s.tar")
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    assert len(list(scan(path))) == 4
    for cut in range(0, end + 1, 512):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"s\.tar: broken after .*fetch it again or leave it"):
            list(scan(path))
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        headers = [member.offset for member in archive]
    for offset in headers:
        path.write_bytes(whole[:offset] + b"\x01" * 512 + whole[offset + 512 :])
        with pytest.raises(DataError, match="broken after"):
            list(scan(path))


def test_shards_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s-00002\.tar: no such file; check the shard numbers"):
        open_table(tmp_path / "s-{00002..00003}.tar")
    (tmp_path / "s.tar.gz").write_bytes(gzip.compress(shard(tmp_path / "s.tar").read_bytes()))
    with pytest.raises(DataError, match="gunzip it"):
        open_table(tmp_path / "s.tar.gz")


def test_bad_samples_are_rejected_by_shard_and_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        add(archive, "good.png", picture_bytes(0))
        add(archive, "good.txt", b"a cat")
        add(archive, "json.png", picture_bytes(0))
        add(archive, "json.json", b'{"caption": ')
        add(archive, "lone.txt", b"a cat")
        add(archive, "latin.png", picture_bytes(0))
        add(archive, "latin.txt", "é".encode("latin1"))
    records = read_examples(tmp_path / "s.tar")
    assert [e.id for e in records.examples] == ["good"]
    reasons = {r.record: r.reason for r in records.rejected}
    assert list(reasons) == [f"s.tar, sample '{key}'" for key in ("json", "lone", "latin")]
    assert reasons["s.tar, sample 'json'"].startswith("not JSON")
    assert "no picture" in reasons["s.tar, sample 'lone'"]
    assert "not UTF-8" in reasons["s.tar, sample 'latin'"]


def test_an_archive_that_shrank_is_told_when_a_picture_is_read(tmp_path: Path) -> None:
    examples = read_examples(shard(tmp_path / "s.tar")).examples
    (tmp_path / "s.tar").write_bytes(b"")
    with pytest.raises(ImageError, match=r"s\.tar:3\.jpg.*is shorter than it was"):
        open_image(first_picture(examples[3]))
    (tmp_path / "s.tar").unlink()
    with pytest.raises(ImageError, match=r"s\.tar:3\.jpg.*No such file"):
        open_image(first_picture(examples[3]))


# ---------------------------------------------------------------------- tables


def test_pictures_of_a_table_are_bytes_paths_or_nothing(tmp_path: Path) -> None:
    layouts.write_pictures(tmp_path)
    values = [
        hugging_face_struct(0),
        {"bytes": None, "path": str(tmp_path / "images/1.png")},
        None,
        hugging_face_struct(3),
    ]
    table = pa.table({"image": pa.array(values, PICTURE), "caption": list(TEXTS)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=3)
    records = read_examples(tmp_path / "t.parquet")
    colours = [open_image(first_picture(e)).getpixel((0, 0)) for e in records.examples]
    assert colours == [(255, 0, 0), (0, 128, 0), (255, 255, 0)]
    (rejected,) = records.rejected
    assert (rejected.record, rejected.reason) == ("row 3", "it has no picture")
    cell = first_picture(records.examples[2])
    assert cell.key == f"{tmp_path}/t.parquet, row 4, image"
    copy = pickle.loads(pickle.dumps(cell.source))  # to workers that are no forks
    assert copy.read() == picture_bytes(3)
    assert len(pickle.dumps(cell.source)) < 10_000


def test_lists_of_pictures_and_bare_bytes(tmp_path: Path) -> None:
    several = [[hugging_face_struct(2), hugging_face_struct(1)], [], None, [hugging_face_struct(0)]]
    turns = [{"from": "human", "value": "<image><image>a"}, {"from": "gpt", "value": "b"}]
    table = pa.table({"images": pa.array(several, pa.list_(PICTURE)), "conversations": [turns] * 4})
    pq.write_table(table, tmp_path / "t.parquet")
    records = read_examples(tmp_path / "t.parquet")
    assert [r.record for r in records.rejected] == ["row 2", "row 3", "row 4"]
    pictures = records.examples[0].query[0].content  # type: ignore[index]
    assert [open_image(p).getpixel((0, 0)) for p in pictures] == [(0, 0, 255), (0, 128, 0)]  # type: ignore[arg-type]
    bare = pa.table({"image": [picture_bytes(n) for n in range(4)], "caption": list(TEXTS)})
    pq.write_table(bare, tmp_path / "b.parquet")
    examples = read_examples(tmp_path / "b.parquet").examples
    assert open_image(first_picture(examples[2])).getpixel((0, 0)) == (0, 0, 255)


def test_a_selection_of_a_data_set_reads_its_own_pictures(tmp_path: Path) -> None:
    rows = {"image": [hugging_face_struct(n) for n in range(4)], "caption": list(TEXTS)}
    chosen = datasets.Dataset.from_dict(rows).select([3, 1])
    raws = list(dataset_table(chosen, "x", None).rows())
    assert [raw.content["caption"] for raw in raws] == [TEXTS[3], TEXTS[1]]
    assert [raw.content["image"].read() for raw in raws] == [picture_bytes(3), picture_bytes(1)]


def test_splits_are_found_or_asked_for(tmp_path: Path) -> None:
    def made(*texts: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"anchor": list(texts), "positive": ["x"] * len(texts)})

    path = tmp_path / "saved"
    datasets.DatasetDict({"original": made("a", "b"), "other": made("c")}).save_to_disk(str(path))
    with pytest.raises(DataError, match="set split; there are original, other"):
        read_examples(path)
    with pytest.raises(DataError, match="split 'test' is not there; there are original, other"):
        read_examples(path, Reading(split="test"))
    assert len(read_examples(path, Reading(split="original"))) == 2


def test_a_folder_of_parquet_files_is_one_data_set(tmp_path: Path) -> None:
    folder = layouts.sentence_transformers(tmp_path / "data").parent
    (folder / "pairs.parquet").rename(folder / "train-00000-of-00001.parquet")
    assert len(read_examples(folder)) == 4


def test_a_hub_data_set_that_cannot_be_had_is_one_error() -> None:
    with pytest.raises(DataError, match="hub:nobody/nothing: cannot be loaded from the hub"):
        read_examples("hub:nobody/nothing")


# ---------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "not JSON .the file is empty"),
        ("a.jsonl", b"", "it has no records"),
        ("a.jsonl", b"{\n", "line 1: not JSON"),
        ("a.json", b"[]", "it has no records"),
        ("a.csv", b"", "fit no format"),
        ("a.parquet", b"", "cannot be read"),
        ("a.parquet", b"PAR1 no more of it PAR1", "cannot be read"),
        ("a.tar", b"", "broken after its beginning"),
        ("a.tar", b"no archive" * 100, "broken after its beginning"),
        ("a.csv", b"title,\xff\n", "cannot be read"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*{message}") as caught:
        read_examples(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_an_absent_column_names_those_that_are_there_and_the_nearest(tmp_path: Path) -> None:
    path = write_json(tmp_path / "data.jsonl", [{"title": "a", "photo": "b.png"}])
    with pytest.raises(DataError) as caught:
        read_examples(path, Reading(columns={"image": "foto", "text": "title"}))
    assert str(caught.value) == (
        f"{path}: columns: image is 'foto', and there is no such column; did you mean 'photo'?; "
        "there are photo, title"
    )
    with pytest.raises(DataError, match="no format reads 'imag'; did you mean 'image'"):
        read_examples(path, Reading(columns={"imag": "photo"}))


def test_an_empty_folder_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="data: no data set in this folder"):
        read_examples(tmp_path / "data")


# ---------------------------------------------------------------------- pixel budget


@pytest.mark.parametrize(
    ("size", "budget", "expected"),
    [
        ((40, 30), 1200, (40, 30)),
        ((40, 30), 1199, (39, 29)),
        ((400, 100), 10_000, (200, 50)),
        ((1000, 1000), 1, (1, 1)),
        ((1, 200), 10, (1, 10)),
    ],
)
def test_sizes_within_a_budget_by_hand(
    size: tuple[int, int], budget: int, expected: tuple[int, int]
) -> None:
    assert fitting_size(*size, budget) == expected


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pictures_of_a_source_are_made_smaller_when_opened(tmp_path: Path, kind: str) -> None:
    picture = PIL.Image.new("RGB", (800, 400), "red")
    picture.paste("blue", (400, 0, 800, 400))
    exif = PIL.Image.Exif()
    exif[274] = 6  # turned by a quarter
    picture.save(tmp_path / "a.img", kind, exif=exif)
    path = write_json(tmp_path / "data.jsonl", [{"image": "a.img", "caption": "a cat"}])
    (small,) = read_examples(path, Reading(pixel_budget=5000)).examples
    opened = open_image(first_picture(small))
    assert opened.size == (50, 100)
    red, blue = opened.getpixel((25, 10)), opened.getpixel((25, 90))
    assert red[0] > 240 > 15 > red[2]  # type: ignore[index]
    assert blue[2] > 240 > 15 > blue[0]  # type: ignore[index]
    (whole,) = read_examples(path).examples
    assert open_image(first_picture(whole)).size == (400, 800)
    assert first_picture(small).key != first_picture(whole).key
