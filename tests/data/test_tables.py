"""How records are stored: archives, tables, and what is said of broken ones."""

from __future__ import annotations

import base64
import gzip
import io
import json
import pickle
import tarfile
import unicodedata
from pathlib import Path

import datasets
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cafe.data.media_paths import MediaResolver
from cafe.data.read import read_examples
from cafe.data.records import ReadOptions
from cafe.data.tables import open_table, tar
from cafe.data.tables.arrow import dataset_table
from cafe.data.tables.splits import split_of
from cafe.data.tables.tar import FileSlice, Sample, expand, scan
from cafe.errors import DataError, ImageError
from cafe.media import fitting_size, open_image
from cafe.recipes import DataSource
from cafe.retrieval.sources import SourceRecord, open_source
from cafe.types import Example, Image
from helpers import layouts
from helpers.layouts import IMAGE, TEXTS, add, hugging_face_struct, image_bytes, write_json


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def first_image(example: Example) -> Image:
    assert example.query is not None
    (image,) = example.query[0].content
    assert isinstance(image, Image)
    return image


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
    assert [name for name, _, _ in first.images] == ["dir/a.b.png"]
    assert second == Sample("dir/b", second.images, {})
    content = path.read_bytes()
    for sample, expected in ((first, b"12345"), (second, b"678")):
        ((member, offset, size),) = sample.images
        assert content[offset : offset + size] == expected
        assert FileSlice(path, member, offset, size).read() == expected


def test_points_in_names_are_read_as_webdataset_reads_them_where_that_gives_samples(
    tmp_path: Path,
) -> None:
    """The suffix begins at the first point; at the last where no text would be known else."""
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for name in (
            *("./photo.V1.jpg", "./photo.V1.txt", "./photo.v2.png", "./photo.v2.txt"),
            *("2024.05.01.jpg", "2024.05.01.caption"),
            *("0.jpg", "0.seg.png", "0.seg.txt", "0.txt"),  # WebDataset's own
            *("1.left.jpg", "1.right.jpg", "1.json"),
            *("2.left.jpg", "2.right.jpg"),
        ):
            add(archive, name, b"{}")
    samples = {sample.key: sample for sample in scan(path)}
    assert {key: (len(s.images), list(s.texts)) for key, s in samples.items()} == {
        "photo.V1": (1, ["txt"]),
        "photo.v2": (1, ["txt"]),
        "2024.05.01": (1, ["caption"]),
        "0": (2, ["txt"]),
        "1": (2, ["json"]),
        "2": (2, []),
    }


def test_files_of_macos_in_an_archive_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a/._0.jpg", "a/0.jpg", "a/._0.txt", "a/0.txt", "a/.DS_Store"):
            add(archive, name, b"x")
        for name in ("__MACOSX/a/._0.jpg", "__MACOSX/0.jpg"):
            add(archive, name, b"x")
    (tmp_path / "._s.tar").write_bytes(b"attributes of macOS")
    (sample,) = scan(path)
    assert (sample.key, [name for name, _, _ in sample.images]) == ("a/0", ["a/0.jpg"])
    assert len(list(open_table(tmp_path).rows())) == 1


def test_a_text_and_its_image_meet_however_their_names_are_composed(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, unicodedata.normalize("NFD", "é.jpg"), b"x")
        add(archive, unicodedata.normalize("NFC", "é.txt"), b"a cat")
    (sample,) = scan(path)
    assert (len(sample.images), sample.texts) == (1, {"txt": "a cat"})


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_a_text_that_is_too_large_is_not_read_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """3 GB of zeros in a small file: a member that the file system need not store."""
    size = 3 * 2**30
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "0.jpg", image_bytes(0))
        member = tarfile.TarInfo(f"0.{suffix}")
        member.size = size
        archive.addfile(member)
        archive.fileobj.seek(archive.offset + size)  # type: ignore[union-attr]
        archive.offset += size
        add(archive, "1.jpg", image_bytes(1))
        add(archive, "1.txt", b"a cat")
    for _ in range(2):  # read, then from the index that was kept
        records = read_examples(path, index=tmp_path / "index")
        assert [e.id for e in records.examples] == ["1"]
        assert [s.reason for s in records.skipped] == [
            f"0.{suffix} has 3,221,225,472 bytes, and a text at most 16,777,216; cut or remove it"
        ]
        monkeypatch.setattr(tar, "scan", None)


def test_images_with_a_text_file_each_are_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for number, name in enumerate(("photo.v1", "deep/b", "._b")):
        (tmp_path / f"{name}.jpg").write_bytes(image_bytes(number, "JPEG"))
        (tmp_path / f"{name}.txt").write_text(f"{TEXTS[number]}\n")
    (tmp_path / "lone.png").write_bytes(image_bytes(3))
    (tmp_path / "large.png").write_bytes(image_bytes(3))
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(3 * 2**30)
    records = read_examples(tmp_path)
    assert records.format == "captions"
    assert [(e.id, e.target_id) for e in records.examples] == [
        ("deep/b.jpg", TEXTS[1]),
        ("photo.v1.jpg", TEXTS[0]),
    ]
    assert [(s.record, s.reason.split(";")[0]) for s in records.skipped] == [
        ("large.png", "large.txt has 3,221,225,472 bytes, and a text at most 16,777,216"),
        ("lone.png", "it has no caption"),
    ]


def test_conversations_in_an_archive_show_its_images(tmp_path: Path) -> None:
    """The JSON's own image name is of a place before packing."""
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for n, record in enumerate(layouts.llava_records()):
            add(archive, f"{n}.png", image_bytes(n))
            add(archive, f"{n}.json", json.dumps(record).encode())
    records = read_examples(tmp_path / "s.tar")
    assert records.format == "llava"
    assert [e.id for e in records.examples] == [f"llava-{n}" for n in range(4)]
    assert open_image(first_image(records.examples[2])).getpixel((0, 0)) == (0, 0, 255)


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
        add(archive, "new.png", image_bytes(0))
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
            add(archive, f"{n}.jpg", image_bytes(n, "JPEG"))
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
        add(archive, "good.png", image_bytes(0))
        add(archive, "good.txt", b"a cat")
        add(archive, "json.png", image_bytes(0))
        add(archive, "json.json", b'{"caption": ')
        add(archive, "lone.txt", b"a cat")
        add(archive, "latin.png", image_bytes(0))
        add(archive, "latin.txt", "é".encode("latin1"))
    records = read_examples(tmp_path / "s.tar")
    assert [e.id for e in records.examples] == ["good"]
    reasons = {r.record: r.reason for r in records.skipped}
    assert list(reasons) == [f"s.tar, sample '{key}'" for key in ("json", "lone", "latin")]
    assert reasons["s.tar, sample 'json'"].startswith("not JSON")
    assert "no image" in reasons["s.tar, sample 'lone'"]
    assert "not UTF-8" in reasons["s.tar, sample 'latin'"]


def test_an_archive_that_shrank_is_told_when_a_image_is_read(tmp_path: Path) -> None:
    examples = read_examples(shard(tmp_path / "s.tar")).examples
    (tmp_path / "s.tar").write_bytes(b"")
    with pytest.raises(ImageError, match=r"s\.tar:3\.jpg.*is shorter than it was"):
        open_image(first_image(examples[3]))
    (tmp_path / "s.tar").unlink()
    with pytest.raises(ImageError, match=r"s\.tar:3\.jpg.*No such file"):
        open_image(first_image(examples[3]))


# ---------------------------------------------------------------------- tables


def test_images_of_a_table_are_bytes_paths_or_nothing(tmp_path: Path) -> None:
    layouts.write_images(tmp_path)
    values = [
        hugging_face_struct(0),
        {"bytes": None, "path": str(tmp_path / "images/1.png")},
        None,
        hugging_face_struct(3),
    ]
    table = pa.table({"image": pa.array(values, IMAGE), "caption": list(TEXTS)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=3)
    records = read_examples(tmp_path / "t.parquet")
    colours = [open_image(first_image(e)).getpixel((0, 0)) for e in records.examples]
    assert colours == [(255, 0, 0), (0, 128, 0), (255, 255, 0)]
    (rejected,) = records.skipped
    assert (rejected.record, rejected.reason) == ("row 3", "it has no image")
    cell = first_image(records.examples[2])
    assert cell.key == f"{tmp_path}/t.parquet, row 4, image"
    copy = pickle.loads(pickle.dumps(cell.source))  # to workers that are no forks
    assert copy.read() == image_bytes(3)
    assert len(pickle.dumps(cell.source)) < 10_000


def test_lists_of_images_and_bare_bytes(tmp_path: Path) -> None:
    several = [[hugging_face_struct(2), hugging_face_struct(1)], [], None, [hugging_face_struct(0)]]
    turns = [{"from": "human", "value": "<image><image>a"}, {"from": "gpt", "value": "b"}]
    table = pa.table({"images": pa.array(several, pa.list_(IMAGE)), "conversations": [turns] * 4})
    pq.write_table(table, tmp_path / "t.parquet")
    records = read_examples(tmp_path / "t.parquet")
    assert [r.record for r in records.skipped] == ["row 2", "row 3", "row 4"]
    images = records.examples[0].query[0].content  # type: ignore[index]
    assert [open_image(p).getpixel((0, 0)) for p in images] == [(0, 0, 255), (0, 128, 0)]  # type: ignore[arg-type]
    bare = pa.table({"image": [image_bytes(n) for n in range(4)], "caption": list(TEXTS)})
    pq.write_table(bare, tmp_path / "b.parquet")
    examples = read_examples(tmp_path / "b.parquet").examples
    assert open_image(first_image(examples[2])).getpixel((0, 0)) == (0, 0, 255)


def test_a_selection_of_a_data_set_reads_its_own_images(tmp_path: Path) -> None:
    rows = {"image": [hugging_face_struct(n) for n in range(4)], "caption": list(TEXTS)}
    chosen = datasets.Dataset.from_dict(rows).select([3, 1])
    raws = list(dataset_table(chosen, "x", None).rows())
    assert [raw.content["caption"] for raw in raws] == [TEXTS[3], TEXTS[1]]
    assert [raw.content["image"].read() for raw in raws] == [image_bytes(3), image_bytes(1)]


def test_splits_are_found_or_asked_for(tmp_path: Path) -> None:
    def made(*texts: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"anchor": list(texts), "positive": ["x"] * len(texts)})

    path = tmp_path / "saved"
    datasets.DatasetDict({"original": made("a", "b"), "other": made("c")}).save_to_disk(str(path))
    with pytest.raises(DataError, match="set split; there are original, other"):
        read_examples(path)
    with pytest.raises(DataError, match="split 'test' is not there; there are original, other"):
        read_examples(path, ReadOptions(split="test"))
    assert len(read_examples(path, ReadOptions(split="original"))) == 2


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("folder", [".", "data", "DocVQA"])
def test_files_that_are_named_by_splits_are_never_mixed(
    tmp_path: Path, folder: str, linked: bool
) -> None:
    """A local copy of MMEB-train; as links to blobs too, as in a cache of the hub."""

    def write(name: str, *texts: str) -> None:
        blob = tmp_path / "blobs" / name.split("-")[0]
        file = tmp_path / "copy" / folder / name
        for path in (blob, file):
            path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({"anchor": list(texts), "positive": ["x"] * len(texts)})
        pq.write_table(table, blob if linked else file)
        if linked:
            file.symlink_to(blob)

    write("original-00000-of-00001.parquet", "a", "b")
    assert len(read_examples(tmp_path / "copy")) == 2
    write("diverse_instruction-00000-of-00001.parquet", "c")
    with pytest.raises(DataError, match="set split; there are diverse_instruction, original"):
        read_examples(tmp_path / "copy")
    with pytest.raises(DataError, match="split 'test' is not there; there are diverse_instr"):
        read_examples(tmp_path / "copy", ReadOptions(split="test"))
    for split, count in {"original": 2, "diverse_instruction": 1}.items():
        assert len(read_examples(tmp_path / "copy", ReadOptions(split=split))) == count
    write("test-00000-of-00001.parquet", "d", "e", "f")
    write("train-00000-of-00001.parquet", "g", "h", "i", "j")
    for split, count in {None: 4, "train": 4, "test": 3, "original": 2}.items():
        assert len(read_examples(tmp_path / "copy", ReadOptions(split=split))) == count


def test_shards_of_several_splits_in_a_folder_are_never_mixed(tmp_path: Path) -> None:
    def write(name: str, count: int) -> None:
        with tarfile.open(tmp_path / name, "w") as archive:
            for n in range(count):
                add(archive, f"{name}-{n}.jpg", image_bytes(n, "JPEG"))
                add(archive, f"{name}-{n}.txt", TEXTS[n].encode())

    write("val-000000.tar", 1)
    write("coco_test_000000.tar", 2)
    with pytest.raises(DataError, match="set split; there are test, validation"):
        read_examples(tmp_path)
    write("train-000000.tar", 3)
    for split, count in {None: 3, "train": 3, "test": 2, "val": 1, "validation": 1}.items():
        assert len(read_examples(tmp_path, ReadOptions(split=split))) == count
    write("more.tar", 4)
    with pytest.raises(DataError, match="some files are of split test, train, validation by their"):
        read_examples(tmp_path)
    assert len(read_examples(tmp_path, ReadOptions(split="test"))) == 2


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("val-00000-of-00002.parquet", "validation"),
        ("diverse_instruction-00000-of-00001.parquet", "diverse_instruction"),
        ("refcoco-testA-00000-of-00001.parquet", "refcoco-testA"),
        ("imagenet1k-train-000000.tar", "train"),
        ("dev_3.tar", "validation"),
        ("00000.tar", None),
        ("contest.parquet", None),
    ],
)
def test_the_split_that_a_name_says(name: str, split: str | None) -> None:
    assert split_of(Path(name)) == split


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
        read_examples(path, ReadOptions(columns={"image": "foto", "text": "title"}))
    assert str(caught.value) == (
        f"{path}: columns: image is 'foto', and there is no such column; did you mean 'photo'?; "
        "there are photo, title"
    )
    with pytest.raises(DataError, match="no format reads 'imag'; did you mean 'image'"):
        read_examples(path, ReadOptions(columns={"imag": "photo"}))


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
def test_images_of_a_source_are_made_smaller_when_opened(tmp_path: Path, kind: str) -> None:
    image = PIL.Image.new("RGB", (800, 400), "red")
    image.paste("blue", (400, 0, 800, 400))
    exif = PIL.Image.Exif()
    exif[274] = 6  # turned by a quarter
    image.save(tmp_path / "a.img", kind, exif=exif)
    path = write_json(tmp_path / "data.jsonl", [{"image": "a.img", "caption": "a cat"}])
    (small,) = read_examples(path, ReadOptions(max_pixels=5000)).examples
    opened = open_image(first_image(small))
    assert opened.size == (50, 100)
    red, blue = opened.getpixel((25, 10)), opened.getpixel((25, 90))
    assert red[0] > 240 > 15 > red[2]  # type: ignore[index]
    assert blue[2] > 240 > 15 > blue[0]  # type: ignore[index]
    (whole,) = read_examples(path).examples
    assert open_image(first_image(whole)).size == (400, 800)
    assert first_image(small).key != first_image(whole).key


def test_every_option_is_a_key_of_a_data_source() -> None:
    source = DataSource(path="a.json", mode="chat", max_pixels=300, limit=2)
    assert ReadOptions.of(source) == ReadOptions(mode="chat", max_pixels=300, limit=2)


def test_a_large_field_of_a_csv_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.csv"
    path.write_text("image,caption\n" + "A" * 300_000 + ",a\n", encoding="utf-8")
    (row,) = open_table(path).rows()
    assert len(row.content["image"]) == 300_000


@pytest.mark.parametrize(
    "pattern",
    [
        "s-{000..999999999}.tar",
        "{a,b}" * 40 + ".tar",
        "{0..9999}{0..9999}.tar",
        "{" * 5000 + ".tar",
    ],
)
def test_a_pattern_of_too_many_shards_is_said(pattern: str) -> None:
    with pytest.raises(DataError, match=r"names [\d,]+ shards; name at most 100,000"):
        open_table(pattern)


@pytest.mark.parametrize(
    "head", ["image/png;charset=utf-8", "application/octet-stream", "IMAGE/PNG;name=a.png", ""]
)
def test_a_data_url_may_say_more_than_its_type(tmp_path: Path, head: str) -> None:
    content = base64.b64encode(b"some bytes").decode()
    for scheme in ("data", "DATA"):
        url = f"{scheme}:{head};base64,{content}"
        assert MediaResolver(tmp_path).image(url).source == b"some bytes"
        (tmp_path / "a.csv").write_text(f'image\n"{url}"\n')
        (record,) = open_source(tmp_path / "a.csv").records()
        assert isinstance(record, SourceRecord)
        assert record.image is not None
        assert record.image.source == b"some bytes"


def test_base64_may_be_in_lines_as_mail_programs_write_it(tmp_path: Path) -> None:
    content = bytes(range(256))
    url = "data:image/png;base64," + base64.encodebytes(content).decode().replace("\n", "\r\n")
    assert url.count("\n") == 5
    assert MediaResolver(tmp_path).image(url).source == content
    with pytest.raises(DataError, match="if it is base64, write data:image/png;base64, in front"):
        MediaResolver(tmp_path).image(base64.b64encode(content).decode())
