"""Pictures and what is known about them, for evaluation.

Two sources: a folder of scenes (`cafe.data.scenes.write_scenes`: exact truth, questions with their
kinds), and captions in LLaVA's format (`cafe.data.formats.llava`: any number of captions per
picture).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cafe.data.read import read_examples
from cafe.data.records import Reading
from cafe.data.scenes import PROMPT_CAPTION, Question, read_truth
from cafe.errors import DataError
from cafe.types import Conversation, Image, Message, user


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture.

    captions   the references, at least one
    dialogues  conversations in which they are the answers
    questions  with exact answers
    kinds      the kinds of things that it shows; None where nobody knows
    """

    id: str
    image: Image
    captions: tuple[str, ...]
    dialogues: tuple[Conversation, ...]
    questions: tuple[Question, ...] = ()
    kinds: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Pictures:
    """What was read, and for each record that could not be used where it is and why."""

    pictures: tuple[Picture, ...]
    rejected: tuple[str, ...] = ()


def read_pictures(path: Path, limit: int | None = None) -> Pictures:
    """The pictures of a scenes folder, or those of captions in LLaVA's format.

    path    a folder with `truth.jsonl` (scenes); else a `.json` or `.jsonl` file of captions, or a
            folder with `captions.json`
    limit   use the first so many pictures only

    Raises:
        DataError: nothing of that kind is there, or nothing in it can be used; a picture of a
            scene is missing.
    """
    if (path / "truth.jsonl").is_file():
        return Pictures(tuple(_scenes(path))[:limit])
    file = path / "captions.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"{path}: no truth.jsonl and no captions.json in it; write a folder with "
            "`cafe data scenes`, or name a file of captions in LLaVA's format"
        )
    return _captioned(file, limit)


def _scenes(folder: Path) -> Iterator[Picture]:
    questions = _questions(folder / "questions.json")
    for truth in read_truth(folder):
        path = folder / truth.image
        if not path.is_file():
            raise DataError(f"{path}: no such picture; write the folder anew")
        image = Image(path)
        yield Picture(
            id=truth.id,
            image=image,
            captions=(truth.caption,),
            dialogues=((*user(image, PROMPT_CAPTION), Message("assistant", (truth.caption,))),),
            questions=questions.get(truth.image, ()),
            kinds=frozenset(truth.scene.kinds),
        )


def _captioned(file: Path, limit: int | None) -> Pictures:
    """Captions in LLaVA's format; those of one picture come together."""
    records = read_examples(file, Reading(mode="caption"))
    pictures: dict[object, Picture] = {}
    rejected = [str(item) for item in records.rejected]
    for example in records.examples:
        assert example.query is not None  # a caption is one side of a pair, its picture
        assert example.target is not None  # and the caption the other
        images = [part for part in example.query[0].content if isinstance(part, Image)]
        if len(images) != 1:
            rejected.append(f"{file}, {example.id}: {len(images)} pictures, expected one")
            continue
        first = pictures.get(images[0].key)
        pictures[images[0].key] = Picture(
            id=first.id if first else example.id,
            image=images[0],
            captions=(*(first.captions if first else ()), example.target[0].text),
            dialogues=(*(first.dialogues if first else ()), *example.dialogues),
        )
    if not pictures:
        reason = f"; the first: {rejected[0]}" if rejected else ""
        raise DataError(f"{file}: no record is one picture with a caption{reason}")
    return Pictures(tuple(pictures.values())[:limit], tuple(rejected))


def _questions(file: Path) -> dict[str, tuple[Question, ...]]:
    """Picture path -> the questions about it. No file, no questions."""
    if not file.is_file():
        return {}
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); write the folder anew") from error
    found = {}
    for number, record in enumerate(records):
        try:
            found[record["image"]] = tuple(_record_questions(record))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{file}, record {number}: not a picture's questions ({error}); "
                "write the folder anew"
            ) from error
    return found


def _record_questions(record: dict[str, Any]) -> Iterator[Question]:
    turns = [turn["value"] for turn in record["conversations"]]
    for kind, text, answer in zip(record["kinds"], turns[::2], turns[1::2], strict=True):
        yield Question(kind, text.removeprefix("<image>\n"), answer)
