"""Files of captions as they are published or kept: what is read from each, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from cafe.data.read import read_examples
from cafe.data.records import ReadOptions
from cafe.errors import DataError
from cafe.retrieval.sources import SourceRecord, list_items, open_source
from cafe.types import Image

Captions = list[tuple[str, str]]

EXPECTED: Captions = [
    ("a.jpg", "A child in a pink dress ."),
    ("a.jpg", "A girl, smiling, goes in ."),
    ("b.jpg", 'A "sale" sign .'),
]


def images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (4, 3)).save(folder / name)
    return folder


def read(path: Path, **options: Any) -> Captions:
    """Each pair as the name of its image and its caption; nothing may be skipped."""
    records = read_examples(path, ReadOptions(**options))
    assert records.format == "captions"
    assert not records.skipped, records.skipped
    pairs: Captions = []
    for example in records.examples:
        assert example.query is not None
        assert example.target is not None
        (image,) = example.query[0].content
        assert isinstance(image, Image)
        assert isinstance(image.source, Path)
        pairs.append((image.source.name, example.target[0].text))
    return pairs


LINES = {
    "captions.txt": (
        "image,caption\n"
        "a.jpg,A child in a pink dress .\n"
        'a.jpg,"A girl, smiling, goes in ."\n'
        'b.jpg,"A ""sale"" sign ."\n'
    ),
    "unquoted.txt": (
        "image,caption\n"
        "a.jpg,A child in a pink dress .\n"
        "a.jpg,A girl, smiling, goes in .\n"
        'b.jpg,A "sale" sign .\n'
    ),
    "unquoted.csv": (
        "image,caption\n"
        "a.jpg,A child in a pink dress .\n"
        "a.jpg,A girl, smiling, goes in .\n"
        'b.jpg,A "sale" sign .\n'
    ),
    "results.csv": (
        "image_name| comment_number| comment\n"
        "a.jpg| 0| A child in a pink dress .\n"
        "a.jpg| 1   A girl, smiling, goes in .\n"  # as one line of the published file
        'b.jpg| 0| A "sale" sign .\n'
    ),
    "Flickr8k.token.txt": (
        "a.jpg#0\tA child in a pink dress .\n"
        "a.jpg#1\tA girl, smiling, goes in .\n"
        'b.jpg#0\tA "sale" sign .\n'
    ),
    "results_20130124.token": (
        "a.jpg#0\tA child in a pink dress .\n"
        "a.jpg#1\tA girl, smiling, goes in .\n"
        'b.jpg#0\tA "sale" sign .\n'
    ),
    "plain.tsv": (
        "a.jpg\tA child in a pink dress .\r\n"
        "a.jpg\tA girl, smiling, goes in .\r\n"
        'b.jpg\tA "sale" sign .\r\n'
    ),
    "spreadsheet.csv": (
        "caption;image\n"
        "A child in a pink dress .;a.jpg\n"
        "A girl, smiling, goes in .;a.jpg\n"
        '"A ""sale"" sign .";b.jpg\n'
    ),
    "header.tsv": (
        "image\tcaption\n"
        "a.jpg\tA child in a pink dress .\n"
        "a.jpg\tA girl, smiling, goes in .\n"
        'b.jpg\tA "sale" sign .\n'
    ),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("folder", ["", "Images", "flickr30k_images"])
def test_lines_of_images_and_captions(tmp_path: Path, name: str, folder: str) -> None:
    images(tmp_path / folder, "a.jpg", "b.jpg")
    (tmp_path / name).write_bytes(LINES[name].encode())
    assert read(tmp_path / name) == EXPECTED


def test_captions_of_one_image_are_no_targets_of_one_another(tmp_path: Path) -> None:
    images(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "captions.txt").write_text(LINES["captions.txt"])
    examples = read_examples(tmp_path / "captions.txt").examples
    assert [e.id for e in examples] == ["a.jpg-1", "a.jpg-2", "b.jpg"]
    assert examples[0].target_id == examples[1].target_id != examples[2].target_id


def test_a_line_without_caption_is_skipped_by_its_number(tmp_path: Path) -> None:
    images(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "c.txt").write_text("image,caption\na.jpg,One.\nb.jpg,\n\nb.jpg,Two.\n")
    records = read_examples(tmp_path / "c.txt")
    assert [e.id for e in records.examples] == ["a.jpg", "b.jpg"]
    (skipped,) = records.skipped
    assert (skipped.record, skipped.reason) == ("line 3", "it has no caption ('b.jpg,')")


def test_a_field_too_many_is_said_and_not_dropped(tmp_path: Path) -> None:
    """Where the last column is none of captions, nobody knows to which the comma belongs."""
    images(tmp_path, "a.jpg")
    (tmp_path / "c.csv").write_text("caption,image\nA girl, smiling,a.jpg\nA boy,a.jpg,\n")
    records = read_examples(tmp_path / "c.csv")
    assert len(records.examples) == 1
    (skipped,) = records.skipped
    assert skipped.record == "record 1"
    assert "it has 3 fields, and the header names 2" in skipped.reason


def test_a_column_map_names_the_columns_of_the_file(tmp_path: Path) -> None:
    images(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "results.csv").write_text(LINES["results.csv"])
    columns = {"image": "image_name", "caption": "comment"}
    assert read(tmp_path / "results.csv", columns=columns) == EXPECTED


def coco(folder: Path) -> Path:
    """COCO's own layout: annotations/ beside the folder of images."""
    images(folder, "val2017/000000000009.jpg", "val2017/000000000025.jpg")
    content = {
        "info": {},
        "images": [
            {"id": 25, "file_name": "000000000025.jpg"},
            {"id": 9, "file_name": "000000000009.jpg"},
        ],
        "annotations": [
            {"image_id": 9, "id": 1, "caption": "A tray of food."},
            {"image_id": 25, "id": 2, "caption": "A giraffe."},
            {"image_id": 9, "id": 3, "caption": "Broccoli, bread and fruit."},
        ],
    }
    path = folder / "annotations" / "captions_val2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    return path


COCO: Captions = [
    ("000000000025.jpg", "A giraffe."),
    ("000000000009.jpg", "A tray of food."),
    ("000000000009.jpg", "Broccoli, bread and fruit."),
]


def test_coco(tmp_path: Path) -> None:
    path = coco(tmp_path)
    assert read(path) == COCO
    assert read(path, image_root=tmp_path / "val2017") == COCO
    content = json.loads(path.read_text())
    content["annotations"][0] = {"image_id": 9, "category_id": 51}
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"'caption' is missing.*name captions_"):
        read_examples(path)


def karpathy(folder: Path) -> Path:
    images(folder, "val2014/COCO_val2014_1.jpg", "train2014/COCO_train2014_2.jpg")
    content = {
        "dataset": "coco",
        "images": [
            {
                "filepath": "val2014",
                "filename": "COCO_val2014_1.jpg",
                "imgid": 0,
                "split": "test",
                "sentences": [{"raw": "A man."}, {"raw": "A man with a red helmet."}],
            },
            {
                "filepath": "train2014",
                "filename": "COCO_train2014_2.jpg",
                "imgid": 1,
                "split": "restval",
                "sentences": [{"raw": "A cat."}],
            },
        ],
    }
    (folder / "dataset_coco.json").write_text(json.dumps(content))
    return folder / "dataset_coco.json"


TEST = [("COCO_val2014_1.jpg", "A man."), ("COCO_val2014_1.jpg", "A man with a red helmet.")]


def test_karpathy_s_splits(tmp_path: Path) -> None:
    path = karpathy(tmp_path)
    assert read(path, split="test") == TEST
    assert read(path, split="test+restval") == [*TEST, ("COCO_train2014_2.jpg", "A cat.")]
    with pytest.raises(DataError, match="set split; there are restval, test"):
        read_examples(path)
    with pytest.raises(DataError, match="split 'val' is not there; there are restval, test"):
        read_examples(path, ReadOptions(split="val"))


def test_karpathy_s_flickr_has_no_filepath(tmp_path: Path) -> None:
    images(tmp_path, "flickr30k-images/1.jpg")
    entry = {"filename": "1.jpg", "split": "train", "sentences": [{"raw": "Two men."}]}
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": [entry]}))
    assert read(tmp_path / "dataset_flickr30k.json") == [("1.jpg", "Two men.")]


def test_an_object_that_is_none_of_these_is_described(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('{"data": [], "version": 1}')
    with pytest.raises(DataError, match=r"COCO's captions.*found an object of data, version"):
        read_examples(tmp_path / "data.json")


def test_a_text_beside_each_image(tmp_path: Path) -> None:
    images(tmp_path, "x/a.jpg", "x/b.v1.jpg", "c.png")
    (tmp_path / "x" / "a.txt").write_text("A cat.\n")
    (tmp_path / "x" / "b.v1.caption").write_text("A dog.")
    records = read_examples(tmp_path)
    assert [(e.id, e.target_id) for e in records.examples] == [
        ("x/a.jpg", "A cat."),
        ("x/b.v1.jpg", "A dog."),
    ]
    (skipped,) = records.skipped
    assert (skipped.record, "write it to c.txt" in skipped.reason) == ("c.png", True)
    captions = {item.id: item.text for item in list_items(str(tmp_path)).items}
    assert captions == {"c.png": None, "x/a.jpg": "A cat.", "x/b.v1.jpg": "A dog."}


def test_a_few_files_of_records_beside_captions_are_not_the_data(tmp_path: Path) -> None:
    images(tmp_path, "a.jpg", "b.jpg")
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"A {name}.")
    (tmp_path / "descriptions.json").write_text('{"a.jpg": {"de": "Ein a."}}')
    assert read(tmp_path) == [("a.jpg", "A a."), ("b.jpg", "A b.")]
    rows = [{"image": "b.jpg", "caption": "Of the file."}]
    (tmp_path / "descriptions.json").unlink()
    for number in range(2):  # as many as captions: then these are
        (tmp_path / f"{number}.json").write_text(json.dumps(rows))
    assert {text for _, text in read(tmp_path)} == {"Of the file."}


def test_a_folder_with_its_captions_and_images(tmp_path: Path) -> None:
    images(tmp_path / "Images", "a.jpg", "b.jpg")
    (tmp_path / "captions.txt").write_text(LINES["captions.txt"])
    assert read(tmp_path) == EXPECTED


# ---------------------------------------------------------------------- embed and index


@pytest.mark.parametrize("name", [name for name in LINES if not name.endswith("sv")])
def test_the_same_file_is_embedded_and_indexed_by_image(tmp_path: Path, name: str) -> None:
    images(tmp_path / "Images", "a.jpg", "b.jpg")
    (tmp_path / name).write_text(LINES[name])
    records = [r for r in open_source(tmp_path / name).records() if isinstance(r, SourceRecord)]
    assert [(r.id, r.text, r.path) for r in records] == [
        (image, None, tmp_path / "Images" / image) for image in ("a.jpg", "b.jpg")
    ]
    items = list_items(str(tmp_path / name)).items
    assert [(item.id, item.text) for item in items] == [
        ("a.jpg", "A child in a pink dress .\nA girl, smiling, goes in ."),
        ("b.jpg", 'A "sale" sign .'),
    ]


def test_published_objects_are_embedded_and_indexed(tmp_path: Path) -> None:
    path = coco(tmp_path)
    assert [r.id for r in open_source(path).records() if isinstance(r, SourceRecord)] == ["25", "9"]
    assert [(item.id, item.text) for item in list_items(str(path)).items] == [
        ("000000000025.jpg", "A giraffe."),
        ("000000000009.jpg", "A tray of food.\nBroccoli, bread and fruit."),
    ]


@pytest.mark.parametrize(
    "text", ["a red mug, blue\nphoto.jpg, seen\n", "photo.jpg\nmug.jpg\n", "image and caption\n"]
)
def test_a_list_of_texts_stays_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "notes.txt").write_text(text)
    records = list(open_source(tmp_path / "notes.txt").records())
    assert [r.text for r in records if isinstance(r, SourceRecord)] == text.splitlines()
    with pytest.raises(DataError, match="expected lines of an image and a caption"):
        read_examples(tmp_path / "notes.txt")


def test_json_lines_find_their_images_in_the_usual_folder(tmp_path: Path) -> None:
    images(tmp_path / "images", "a.jpg")
    (tmp_path / "c.jsonl").write_text('{"image": "a.jpg", "caption": "A cat."}\n')
    assert read(tmp_path / "c.jsonl") == [("a.jpg", "A cat.")]
    (record,) = open_source(tmp_path / "c.jsonl").records()
    assert isinstance(record, SourceRecord)
    assert record.path == tmp_path / "images" / "a.jpg"
    assert [item.id for item in list_items(str(tmp_path / "c.jsonl")).items] == ["a.jpg"]
