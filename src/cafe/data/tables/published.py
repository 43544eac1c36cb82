"""JSON files of captions that are one object: COCO's, and Karpathy's splits of COCO and Flickr.

{"images": [{"id": 9, "file_name": "000000000009.jpg"}],
 "annotations": [{"image_id": 9, "id": 661611, "caption": "A tray of food."}]}   captions_*.json
{"dataset": "coco", "images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg",
  "imgid": 0, "split": "test", "sentences": [{"raw": "A man with a red helmet."}]}]}

An image is a record with all its captions. Formats: https://cocodataset.org/#format-data;
https://cs.stanford.edu/people/karpathy/deepimagesent (caption_datasets.zip).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cafe.data.columns import image_folder
from cafe.data.records import NoSuchSplit, RawRecord, Record, Table, kind
from cafe.data.tables.text import json_list, whole_json
from cafe.errors import DataError

_PROBED = 5  # images that are looked for


def json_file(path: Path, split: str | None) -> Table:
    """A list of records, or an object of one of the layouts above.

    Args:
        path: The file.
        split: Of Karpathy's, also several: "train+restval". None: train.

    Raises:
        DataError: It is something else, or has no such split.
    """
    content = whole_json(path)
    if isinstance(content, dict) and isinstance(images := content.get("images"), list):
        if isinstance(content.get("annotations"), list):
            return _table(path, _coco(path, images, content["annotations"]))
        if any(isinstance(image, dict) and "sentences" in image for image in images):
            return _table(path, _karpathy(path, images, split))
    if isinstance(content, dict):
        held = ", ".join(sorted(content)[:10]) or "nothing"
        raise DataError(
            f"{path}: expected a list of records, COCO's captions (images, annotations) or "
            f"Karpathy's (images with sentences), found an object of {held}"
        )
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of records, found {kind(content)}")
    return json_list(path, content)


def _coco(path: Path, images: list[Any], annotations: list[Any]) -> list[tuple[str, Record]]:
    try:
        records = {i["id"]: {"image": str(i["file_name"]), "caption": []} for i in images}
        for annotation in annotations:
            records[annotation["image_id"]]["caption"].append(annotation["caption"])
    except (KeyError, TypeError) as error:
        hint = "; name captions_*.json" if "caption" in str(error) else ""
        raise DataError(f"{path}: not COCO's captions ({error} is missing){hint}") from error
    return [(str(identity), record) for identity, record in records.items()]


def _karpathy(path: Path, images: list[Any], split: str | None) -> list[tuple[str, Record]]:
    try:
        splits = sorted({str(image["split"]) for image in images})
        wanted = {name.strip() for name in (split or "train").split("+")}
        if absent := sorted(wanted.difference(splits)):
            raise NoSuchSplit(path, split and absent[0], splits)
        return [
            (
                str(image["filename"]),
                {
                    "image": "/".join(filter(None, (image.get("filepath"), image["filename"]))),
                    "caption": [sentence["raw"] for sentence in image["sentences"]],
                },
            )
            for image in images
            if image["split"] in wanted
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not Karpathy's captions ({error} is missing)") from error


def _table(path: Path, records: list[tuple[str, Record]]) -> Table:
    """The records, their images where those that are named first are.

    COCO's annotations lie beside the folder of their images, or beside `images` above that.
    """

    def rows() -> Iterator[RawRecord]:
        for number, (identity, record) in enumerate(records, 1):
            yield RawRecord(f"image {number}", identity, record)

    part = path.stem.rpartition("_")[2]
    bases = [path.parent, path.parent.parent]
    beside = [base / name for base in bases for name in ("", "images", part, f"images/{part}")]
    folder = image_folder(path.parent, [record["image"] for _, record in records[:_PROBED]], beside)
    return Table(str(path), folder, frozenset({"image", "caption"}), rows)
