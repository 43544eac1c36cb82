"""POPE (Li et al., arXiv 2305.10355): "Is there a … in the image?", in three settings.

The questions are those that its authors published; `random`, `popular` and `adversarial` say how
the absent objects were chosen. Two layouts:

    folder/coco_pope_random.json …      JSON lines {"question_id": 1, "image": "COCO_val2014_….jpg",
    folder/val2014/COCO_val2014_….jpg   "text": "Is there a fork in the image?", "label": "yes"}
    lmms-lab/POPE (split "test")        rows: question, answer, image_source, image, category

With `instances_val2014.json` (COCO) in the first, `all` asks for all 80 classes about each image:
no choice of absent objects, so no bias in it (the THRONE paper calls that POPE-C).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cafe.errors import DataError
from cafe.evaluation.asking import VisualQuestion, ask
from cafe.evaluation.datasets.coco import article, read_instances
from cafe.evaluation.datasets.rows import (
    RowSource,
    check_unique,
    column,
    local_image,
    read_rows,
    row_image,
)
from cafe.evaluation.scoring import Ratio
from cafe.evaluation.task import Generate, ScoreExamples, TaskResult
from cafe.metrics import parse_yes_no, pope_columns
from cafe.types import Image

SETTINGS = ("random", "popular", "adversarial")
MAX_NEW_TOKENS = 32
"""Enough for "No, there is no … in the image."; the parser reads the first sentence only."""

_LIKELY = ("yes", "no", "Yes", "No")
MEASURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


@dataclass(frozen=True, slots=True)
class PopeQuestion:
    """`label`: whether the object is in the image."""

    setting: str
    image_name: str
    image: Image
    text: str
    label: bool


Parser = Callable[[str], bool]


def pope(
    score_examples: ScoreExamples,
    generate: Generate,
    questions: Sequence[PopeQuestion],
    parse: Parser = parse_yes_no,
) -> TaskResult:
    """Ask all questions. Scores: `<setting>/accuracy`, `…/precision`, `…/recall`, `…/f1` and
    `…/yes_ratio`, with "yes" as the positive answer, and for POPE's three settings `mean/…`.

    A sample is an image with all its questions. An empty or evasive reply counts as a yes, by
    the official parser; the result's details count the empty ones.

    Raises:
        DataError: no questions, or one asked twice.
    """
    if not questions:
        raise DataError("there are no questions; use POPE's question files")
    check_unique([f"{q.setting}, {q.image_name}, {q.text}" for q in questions], "POPE")
    asked = [VisualQuestion(q.image, q.text, _LIKELY) for q in questions]
    # Settings share the questions about present objects: each is asked once.
    distinct = {(one.image.key, one.question): one for one in asked}
    replies = dict(
        zip(
            distinct,
            ask(score_examples, generate, list(distinct.values()), MAX_NEW_TOKENS),
            strict=True,
        )
    )
    texts = [replies[one.image.key, one.question] for one in asked]
    said = np.array([parse(text) for text in texts])
    image_names = list(dict.fromkeys(q.image_name for q in questions))
    number = {name: i for i, name in enumerate(image_names)}
    owners = np.array([number[q.image_name] for q in questions])
    true = np.array([q.label for q in questions])
    setting = np.array([q.setting for q in questions])
    items: dict[str, np.ndarray] = {}
    ratios: dict[str, Ratio] = {}
    names = list(dict.fromkeys(setting.tolist()))
    for name in names:
        chosen = setting == name
        own = pope_columns(owners[chosen], said[chosen], true[chosen], len(image_names))
        items |= {f"{name}/{column}": values for column, values in own.items()}
        ratios |= _ratios(name)
    official = [name for name in names if name in SETTINGS]
    means = {f"mean/{m}": tuple(f"{name}/{m}" for name in official) for m in MEASURES}
    return TaskResult(
        len(questions),
        items,
        ratios,
        means if len(official) > 1 else {},
        ids=tuple(image_names),
        details={"empty_replies": sum(not text.strip() for text in texts)},
    )


def _ratios(setting: str) -> dict[str, Ratio]:
    parts = {
        "accuracy": ("right", "asked"),
        "precision": ("hits", "yes"),
        "recall": ("hits", "there"),
        "f1": ("hits_twice", "yes_and_there"),
        "yes_ratio": ("yes", "asked"),
    }
    return {
        f"{setting}/{name}": Ratio(f"{setting}/{part}", f"{setting}/{whole}")
        for name, (part, whole) in parts.items()
    }


# ---------------------------------------------------------------- question files


def read_pope(source: RowSource, limit: int | None = None) -> list[PopeQuestion]:
    """The questions about the first `limit` images, in one of the two layouts above.

    Raises:
        DataError: neither layout, a record that is not a question, or a missing image.
    """
    folder = Path(source)
    files = {name: folder / f"coco_pope_{name}.json" for name in SETTINGS}
    if folder.is_dir() and any(file.is_file() for file in files.values()):
        questions = [q for name, file in files.items() for q in _file_questions(folder, name, file)]
        instances = folder / "instances_val2014.json"
        if instances.is_file():
            questions += _all_classes(questions, instances)
    else:
        questions = _row_questions(source)
    image_names = list(dict.fromkeys(q.image_name for q in questions))[:limit]
    return [q for q in questions if q.image_name in set(image_names)]


def _file_questions(folder: Path, setting: str, file: Path) -> list[PopeQuestion]:
    if not file.is_file():
        raise DataError(f"{file}: missing; POPE has a file for each of {', '.join(SETTINGS)}")
    images = folder / "val2014" if (folder / "val2014").is_dir() else folder
    questions = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
            name, text = str(record["image"]), str(record["text"])
            label = _label(record["label"], where)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: not a question of POPE ({error})") from error
        image = local_image(images, name, where)
        questions.append(PopeQuestion(setting, name, image, text, label))
    check_unique([f"{q.image_name}, {q.text}" for q in questions], file)
    return questions


def _row_questions(source: RowSource) -> list[PopeQuestion]:
    """Every row contains its image; images of the same name are kept once."""
    images: dict[str, Image] = {}
    questions = []
    for number, row in enumerate(read_rows(source, "test")):
        where = f"row {number}"
        name = str(column(row, ("image_source", "image_id"), source))
        if name not in images:
            images[name] = row_image(row.get("image"), source, where)
        setting = str(column(row, ("category",), source)).lower()
        label = _label(column(row, ("answer", "label"), source), f"{source}, {where}")
        text = str(column(row, ("question", "text"), source))
        questions.append(PopeQuestion(setting, name, images[name], text, label))
    return questions


def _all_classes(questions: Sequence[PopeQuestion], instances: Path) -> list[PopeQuestion]:
    truth = read_instances(instances)
    images = {q.image_name: q.image for q in questions}
    asked = []
    for name, image in images.items():
        if name not in truth.objects:
            raise DataError(f"{instances}: says nothing about image {name!r}")
        for thing in truth.classes:
            text = f"Is there {article(thing)} {thing} in the image?"
            there = thing in truth.objects[name]
            asked.append(PopeQuestion("all", name, image, text, there))
    return asked


def _label(value: object, where: str) -> bool:
    answer = str(value).strip().lower()
    if answer not in ("yes", "no"):
        raise DataError(f"{where}: the label is {value!r}, expected yes or no")
    return answer == "yes"
