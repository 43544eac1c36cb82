"""One grammar: `cafe embed` and `cafe index` accept the same sources, each with its own ids."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cafe.data.read import read_examples
from cafe.errors import DataError
from cafe.index import Index
from cafe.retrieval.blocks import loaded_blocks
from cafe.retrieval.embed import embed_dataset
from cafe.retrieval.folders import FolderImages, folder_images
from cafe.retrieval.sources import SkippedRecord, list_items, open_source


def image(path: Path, width: int = 4, height: int = 3) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    PIL.Image.new("RGB", (width, height)).save(path)


def records_of(source: Path) -> list[tuple[Any, ...]]:
    """What `cafe embed` reads: (id, text, path inside the folder), or the reason of a skip."""
    opened = open_source(source)
    records = list(opened.records())
    assert opened.count == len(records)
    return [
        (r.reason,)
        if isinstance(r, SkippedRecord)
        else (r.id, r.text, r.path and r.path.relative_to(opened.root or "").as_posix())
        for r in records
    ]


def items_of(source: Path) -> list[tuple[str, str, str | None]]:
    """What `cafe index` reads: (id, kind, text)."""
    return [(item.id, item.kind, item.text) for item in list_items(str(source)).items]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_list_of_texts_is_decoded_by_its_mark_and_split_at_any_line_end(
    tmp_path: Path, encoding: str, end: str
):
    texts = ["a big red cat", "ein Bär", "東京"]
    file = tmp_path / "list.txt"
    file.write_bytes(end.join([*texts, ""]).encode(encoding))
    records = list(open_source(file).records())
    assert [(r.id, r.text) for r in records] == list(zip("123", texts, strict=True))
    lines = tmp_path / "list.jsonl"
    lines.write_bytes(end.join(json.dumps({"text": t}) for t in texts).encode(encoding))
    assert [r.text for r in open_source(lines).records()] == texts
    assert [item.text for item in list_items(str(lines)).items] == texts
    table = tmp_path / "list.csv"
    table.write_bytes(end.join(["text", *texts, ""]).encode(encoding))
    assert [r.text for r in open_source(table).records()] == texts


@pytest.mark.parametrize("content", [bytes(range(256)), "a\nb".encode("utf-16-le"), b"\xff\xfea"])
def test_a_list_that_is_no_text_is_one_error(tmp_path: Path, content: bytes):
    file = tmp_path / "list.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"list.txt: (no UTF-8 text|cannot be read)"):
        open_source(file)


def test_lines_of_a_text_file_are_indexed_under_the_ids_that_embed_gives(tmp_path: Path):
    source = tmp_path / "notes.txt"
    source.write_bytes("\ufeffred\n\nblue mug\n".encode() + b"\xff\n")
    assert records_of(source) == [
        ("1", "red", None),
        ("an empty line",),
        ("3", "blue mug", None),
        ("not UTF-8 text",),
    ]
    assert items_of(source) == [("1", "text", "red"), ("3", "text", "blue mug")]
    skipped = list_items(str(source)).skipped
    assert [(s.location, s.reason) for s in skipped] == [
        (f"{source}, line 2", "an empty line"),
        (f"{source}, line 4", "not UTF-8 text"),
    ]


def test_images_without_captions_are_indexed_as_they_are_embedded(tmp_path: Path):
    image(tmp_path / "a.png")
    image(tmp_path / "sub" / "b.png")
    image(tmp_path / "c.png")
    lines = [
        {"image": "a.png", "license": "CC0"},
        {"id": "b", "image": "sub/b.png", "text": None},
        {"image": "c.png", "text": "a mug"},
        {"image": "a.png", "caption": " "},
        {"image": "gone.png"},
    ]
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    assert records_of(source) == [
        ("1", None, "a.png"),
        ("b", None, "sub/b.png"),
        ("3", "a mug", "c.png"),
        ("4", None, "a.png"),
        ("5", None, "gone.png"),
    ]
    listing = list_items(str(source))
    assert [(i.id, i.kind, i.text, dict(i.extra)) for i in listing.items] == [
        ("a.png", "image", None, {"license": "CC0"}),
        ("sub/b.png", "image", None, {"record_id": "b"}),
        ("c.png", "image", "a mug", {}),
    ]
    assert [s.reason.split(":")[0] for s in listing.skipped] == ["image 'gone.png'"]


def test_a_caption_joins_an_image_that_came_without_one(tmp_path: Path):
    image(tmp_path / "a.png")
    lines = [{"image": "a.png"}, {"image": "a.png", "text": "a mug"}, {"image": "a.png"}]
    source = tmp_path / "a.jsonl"
    source.write_text("\n\n".join(map(json.dumps, lines)) + "\n\n")  # empty lines are no records
    assert items_of(source) == [("a.png", "image", "a mug")]
    assert not list_items(str(source)).skipped


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "ndjson"])
def test_text_and_image_columns_mean_the_same_to_embed_in_every_file(tmp_path: Path, suffix: str):
    image(tmp_path / "a.png")
    rows = [
        {"id": "t", "text": "red", "image": None},
        {"id": "i", "text": None, "image": "a.png"},
        {"id": "b", "text": "blue", "image": "a.png"},
        {"id": "n", "text": None, "image": None},
        {"id": "o", "text": None, "image": "../a.png"},
    ]
    source = tmp_path / f"a.{suffix}"
    if suffix in {"csv", "tsv"}:
        separator = {"csv": ",", "tsv": "\t"}[suffix]
        table = [list(rows[0]), *([value or "" for value in row.values()] for row in rows)]
        source.write_text("\n".join(separator.join(line) for line in table))
    else:
        text = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
        source.write_text(text)
    *read, neither, outside = records_of(source)
    assert read == [("t", "red", None), ("i", None, "a.png"), ("b", "blue", "a.png")]
    assert neither[0].startswith("neither text nor image")
    assert outside[0].startswith("image '../a.png' is outside the folder")


def test_other_formats_are_embedded_as_texts_and_images_without_their_captions(tmp_path: Path):
    for name in "abc":
        image(tmp_path / f"{name}.png")
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A mug."}]
    records = [
        {"caption": "a text"},
        {"file_name": "a.png", "caption": "a mug"},
        {"id": "l", "image": "a.png", "conversations": turns},
        {"id": "two", "image": ["b.png", "c.png"], "caption": "two mugs"},
        {"query": "a", "positive": "b"},
    ]
    source = tmp_path / "a.json"
    source.write_text(json.dumps(records))
    *read, pair = records_of(source)
    assert read == [
        ("a-1", "a text", None),
        ("a.png", None, "a.png"),
        ("l", None, "a.png"),
        ("b.png", None, "b.png"),
        ("c.png", None, "c.png"),
    ]
    assert "have two sides" in pair[0]


def test_images_inside_a_table_are_embedded_and_have_no_path(tmp_path: Path, small_dir: Path):
    image(tmp_path / "a.png", 5, 4)
    content = (tmp_path / "a.png").read_bytes()
    source = tmp_path / "photos.parquet"
    rows = [{"image": {"bytes": content, "path": "a.png"}, "text": t} for t in ("red", None)]
    pq.write_table(pa.Table.from_pylist(rows), source)
    loaded = [row for block, _ in loaded_blocks(open_source(source).records()) for row in block]
    assert [(row.id, row.text, row.path) for row in loaded] == [
        ("row-1", "red", None),
        ("row-2", None, None),
    ]
    assert [row.image and row.image.size for row in loaded] == [(5, 4), (5, 4)]
    assert loaded[0].value["text"] == "red"

    def encode(inputs: Any) -> np.ndarray:
        return np.ones((len(inputs), 64), np.float32)

    report = embed_dataset(small_dir, source, to=tmp_path / "t", encode=encode)
    assert report.embedded == 2
    hits = Index.open(tmp_path / "t").search(np.ones(64, np.float32), top=2)
    assert {(h.id, h.metadata["kind"], h.metadata["width"]) for h in hits} == {
        ("row-1", "both", 5),
        ("row-2", "image", 5),
    }


def test_hidden_images_stay_what_they_were_to_each_command(tmp_path: Path):
    image(tmp_path / "b.PNG")
    image(tmp_path / ".cache" / "a.png")
    (tmp_path / "README.md").write_text("no image")
    (tmp_path / "._b.PNG").write_bytes(b"attributes of macOS")
    assert folder_images(tmp_path, hidden=True).names == [".cache/a.png", "b.PNG"]
    assert [record[0] for record in records_of(tmp_path)] == [".cache/a.png", "b.PNG"]
    assert [item[0] for item in items_of(tmp_path)] == ["b.PNG"]
    assert open_source(tmp_path).left_out == {".md": 1}
    assert list_items(str(tmp_path)).left_out == {".md": 1, "hidden images": 1}


def test_a_file_without_suffix_is_an_image_by_its_content(tmp_path: Path):
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "AVIF"):
        PIL.Image.new("RGB", (4, 4)).save(tmp_path / kind, kind)
    (tmp_path / "LICENSE").write_text("BM, and no image")
    (tmp_path / "empty").touch()
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    assert folder_images(tmp_path, hidden=False) == FolderImages(
        ["AVIF", "GIF", "IMG_1.HEIC", "JPEG", "PNG", "TIFF", "WEBP"],
        left_out=Counter({"without suffix": 2}),
    )


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_captions_are_found_however_names_are_composed(tmp_path: Path, stored: str, written: str):
    name = "Äpfel/été.png"
    image(tmp_path / unicodedata.normalize(stored, name))
    lines = [
        {"file_name": unicodedata.normalize(written, name), "text": "a summer"},
        {"file_name": unicodedata.normalize(written, name), "text": "some apples"},
        {"file_name": "gone.png", "text": "nothing"},
        {"file_name": "notes.md", "text": "no image"},
    ]
    (tmp_path / "notes.md").touch()
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    listing = list_items(str(tmp_path))
    assert [(item.id, item.text) for item in listing.items] == [
        (unicodedata.normalize(stored, name), "a summer\nsome apples")
    ]
    assert [(s.location, s.reason) for s in listing.skipped] == [
        ("metadata.jsonl, line 3", "image 'gone.png': no such file in the folder"),
        ("metadata.jsonl, line 4", "image 'notes.md': is not one of the folder's images"),
    ]
    examples = read_examples(tmp_path)
    assert [e.target_id for e in examples.examples[:2]] == ["a summer", "some apples"]
    assert [s.record for s in examples.skipped] == ["line 3"]
    table = tmp_path / "a.csv"
    table.write_text(f"image\n{unicodedata.normalize(written, name)}\n", encoding="utf-8")
    assert [path for _, _, path in records_of(table)] == [unicodedata.normalize(stored, name)]
    assert [i.id for i in list_items(str(table)).items] == [unicodedata.normalize(stored, name)]


def test_of_two_names_that_differ_in_composition_each_has_its_own_caption(tmp_path: Path):
    names = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]
    for name in names:
        image(tmp_path / name)
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system does not tell the names apart")
    lines = [json.dumps({"file_name": name, "text": ascii(name)}) for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    items = list_items(str(tmp_path)).items
    assert [item.text for item in items] == [ascii(item.id) for item in items]


def test_images_of_a_hub_cache_are_read_by_both_commands(tmp_path: Path):
    """A snapshot's files lead to ../../blobs/HASH."""
    image(tmp_path / "blobs" / "1a2b.png")
    (tmp_path / "blobs" / "1a2b.png").rename(tmp_path / "blobs" / "1a2b")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "mug.png").symlink_to("../../blobs/1a2b")
    (snapshot / "a.jsonl").write_text('{"image": "mug.png"}')
    for source in (snapshot, snapshot / "a.jsonl"):
        assert [path for _, _, path in records_of(source)] == ["mug.png"]
        listing = list_items(str(source))
        assert [(item.id, item.path) for item in listing.items] == [("mug.png", "mug.png")]
        assert listing.skipped == []


def test_a_folder_of_records_is_embedded(tmp_path: Path):
    (tmp_path / "metadata.jsonl").write_text('{"text": "red"}\n{"id": "b", "text": "blue"}\n')
    assert records_of(tmp_path) == [("metadata-1", "red", None), ("b", "blue", None)]


@pytest.mark.parametrize("read", [open_source, lambda source: list_items(str(source))])
@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl", "gone.json", "empty.txt"])
def test_both_commands_name_a_source_that_has_nothing(tmp_path: Path, name: str, read: Any):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError) as failure:
        read(tmp_path / name)
    assert str(failure.value).startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize("read", [open_source, list_items])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_column_of_images_that_holds_texts_is_said_at_once(
    tmp_path: Path, read: Any, suffix: str
) -> None:
    path = tmp_path / f"swapped.{suffix}"
    texts = ["a red mug", "two dogs on a beach", "a cat at the top"]
    if suffix == "csv":
        path.write_text("image,caption\n" + "".join(f"{text},a.png\n" for text in texts))
    else:
        lines = [json.dumps({"image": text, "caption": "a.png"}) for text in texts]
        path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"column 'image' is one of images, and 3 of its first 3"):
        read(str(path))
