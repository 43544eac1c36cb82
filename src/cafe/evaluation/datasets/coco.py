"""COCO's annotation files: the classes in each image, and its reference captions.

{"images": [{"id": 9, "file_name": "000000000009.jpg"}], "categories": [{"id": 51, "name": "bowl"}],
"annotations": [{"image_id": 9, "category_id": 51, …}]}               instances_*.json
{"images": […], "annotations": [{"image_id": 9, "caption": "…"}]}      captions_*.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cafe.errors import DataError
from cafe.files import check_is_content


@dataclass(frozen=True, slots=True)
class Instances:
    """Ground truth of a set of images. `objects`: file name -> its classes, for every image."""

    classes: tuple[str, ...]
    objects: dict[str, frozenset[str]]


def read_instances(file: Path) -> Instances:
    """Read COCO's instances.

    Raises:
        DataError: The file is missing or has another format.
    """
    record = _load(file)
    try:
        names = {c["id"]: str(c["name"]) for c in record["categories"]}
        files = {image["id"]: str(image["file_name"]) for image in record["images"]}
        by_file: dict[str, set[str]] = {name: set() for name in files.values()}
        for annotation in record["annotations"]:
            by_file[files[annotation["image_id"]]].add(names[annotation["category_id"]])
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: not COCO's instances ({error} is missing)") from error
    return Instances(tuple(names.values()), {k: frozenset(v) for k, v in by_file.items()})


def read_captions(file: Path) -> dict[str, tuple[str, ...]]:
    """File name -> its captions.

    Raises:
        DataError: The file is missing or has another format.
    """
    record = _load(file)
    try:
        files = {image["id"]: str(image["file_name"]) for image in record["images"]}
        by_file: dict[str, list[str]] = {name: [] for name in files.values()}
        for annotation in record["annotations"]:
            by_file[files[annotation["image_id"]]].append(str(annotation["caption"]))
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: not COCO's captions ({error} is missing)") from error
    return {name: tuple(texts) for name, texts in by_file.items()}


def article(name: str) -> str:
    """The indefinite article before a name, by its first letter."""
    return "an" if name[0].lower() in "aeiou" else "a"


def _load(file: Path) -> Any:
    check_is_content(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}); download COCO's annotations"
        ) from error
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); download it again") from error
