"""COCO's annotation files: which classes a picture shows, and what people wrote about it.

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


@dataclass(frozen=True, slots=True)
class Instances:
    """Truth of a set of pictures. `objects`: file name -> its classes; no picture is left out."""

    classes: tuple[str, ...]
    objects: dict[str, frozenset[str]]


def read_instances(file: Path) -> Instances:
    """Raises DataError when the file is missing or not COCO's instances."""
    record = _load(file)
    try:
        names = {c["id"]: str(c["name"]) for c in record["categories"]}
        files = {image["id"]: str(image["file_name"]) for image in record["images"]}
        found: dict[str, set[str]] = {name: set() for name in files.values()}
        for annotation in record["annotations"]:
            found[files[annotation["image_id"]]].add(names[annotation["category_id"]])
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: not COCO's instances ({error} is missing)") from error
    return Instances(tuple(names.values()), {k: frozenset(v) for k, v in found.items()})


def read_captions(file: Path) -> dict[str, tuple[str, ...]]:
    """File name -> its captions. Raises DataError when the file is missing or no such file."""
    record = _load(file)
    try:
        files = {image["id"]: str(image["file_name"]) for image in record["images"]}
        found: dict[str, list[str]] = {name: [] for name in files.values()}
        for annotation in record["annotations"]:
            found[files[annotation["image_id"]]].append(str(annotation["caption"]))
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: not COCO's captions ({error} is missing)") from error
    return {name: tuple(texts) for name, texts in found.items()}


def article(name: str) -> str:
    """The indefinite article before a name, by its first letter."""
    return "an" if name[0].lower() in "aeiou" else "a"


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}); download COCO's annotations"
        ) from error
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); download it again") from error
