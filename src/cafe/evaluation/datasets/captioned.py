"""Images with captions, questions and object annotations, for evaluation.

Two sources: a folder of scenes (`cafe.data.scenes.write_scenes`: exact truth, questions with their
kinds), and whatever `cafe train` reads as images with texts (`cafe.data`: captions, conversations
about an image, pairs of an image and a text; any number of texts per image).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cafe.data.read import read_examples
from cafe.data.records import NoSuchSplit, ReadOptions, Records
from cafe.data.scenes import SceneQuestion, read_truth
from cafe.errors import DataError
from cafe.files import check_is_content
from cafe.recipes import DataSource
from cafe.types import CAPTION_REQUEST, Conversation, Example, Image, Media, Message, user


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """One image.

    captions   the references, at least one
    dialogues  conversations in which they are the answers
    questions  with exact answers
    kinds      the kinds of objects in it; None without annotations
    """

    id: str
    image: Image
    captions: tuple[str, ...]
    dialogues: tuple[Conversation, ...]
    questions: tuple[SceneQuestion, ...] = ()
    kinds: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class CaptionedImages:
    """The images, and for each skipped record its location and the reason."""

    images: tuple[CaptionedImage, ...]
    skipped: tuple[str, ...] = ()


def read_captioned_images(
    source: str | Path | DataSource, limit: int | None = None
) -> CaptionedImages:
    """The images of a scenes folder, or those of a data source of training.

    Args:
        source: A folder with `truth.jsonl` (scenes); else what `cafe train` reads, with its keys
            or without. Of several splits, test is read where none is named.
        limit: Use the first N images only.

    Raises:
        DataError: nothing of that kind is there, or nothing in it can be used; an image of a
            scene is missing.
    """
    if not isinstance(source, DataSource):
        source = DataSource(path=str(source))
    path = Path(source.path)
    if (path / "truth.jsonl").is_file():
        return CaptionedImages(tuple(_scenes(path))[:limit])
    if source.embedding_prompt == "none":
        raise DataError(
            f"{source.path}: embedding_prompt none is for instructions; this task embeds images "
            "and texts with the model's own prompt"
        )
    if (path / "captions.json").is_file():
        source = source.model_copy(update={"path": str(path / "captions.json")})
    elif path.is_dir() and not any(path.iterdir()):
        raise DataError(
            f"{path}: no truth.jsonl and no captions.json in it; write a folder with "
            "`cafe data scenes`, or name data that `cafe train` reads"
        )
    return _captioned(source, limit)


def _scenes(folder: Path) -> Iterator[CaptionedImage]:
    questions = _questions(folder / "questions.json")
    for truth in read_truth(folder):
        path = folder / truth.image
        if not path.is_file():
            raise DataError(f"{path}: no such image; write the folder again")
        image = Image(path)
        yield CaptionedImage(
            id=truth.id,
            image=image,
            captions=(truth.caption,),
            dialogues=((*user(image, CAPTION_REQUEST), Message("assistant", (truth.caption,))),),
            questions=questions.get(truth.image, ()),
            kinds=frozenset(truth.scene.classes),
        )


def _captioned(source: DataSource, limit: int | None) -> CaptionedImages:
    """The texts of each image."""
    records = _test_split(source)
    by_image: dict[object, CaptionedImage] = {}
    skipped = [str(item) for item in records.skipped]
    for example in records.examples:
        try:
            image, text = _image_and_text(example)
        except DataError as error:
            skipped.append(f"{source.path}, {example.id}: {error}")
            continue
        first = by_image.get(image.key)
        by_image[image.key] = CaptionedImage(
            id=first.id if first else example.id,
            image=image,
            captions=(*(first.captions if first else ()), text),
            dialogues=(*(first.dialogues if first else ()), *example.dialogues),
        )
    if not by_image:
        reason = f"; the first: {skipped[0]}" if skipped else ""
        raise DataError(f"{source.path}: no record is one image with a caption{reason}")
    return CaptionedImages(tuple(by_image.values())[:limit], tuple(skipped))


def _test_split(source: DataSource) -> Records:
    """The records of the split that is named; else of test, or of the only split."""
    options = ReadOptions.of(source)
    if options.split is not None:
        return read_examples(source.path, options)
    try:
        return read_examples(source.path, replace(options, split="test"))
    except NoSuchSplit as error:
        if len(error.splits) != 1:
            raise
        return read_examples(source.path, replace(options, split=error.splits[0]))


def _image_and_text(example: Example) -> tuple[Image, str]:
    """The image and the text of a pair, whichever is the query.

    Raises:
        DataError: It is no pair of one image and a text.
    """
    if example.query is None or example.target is None:
        raise DataError("mode chat gives no pairs; leave it out, or set mode: caption")
    for one, other in ((example.query, example.target), (example.target, example.query)):
        shown, texts = _parts(one)
        described, text = _parts(other)
        if shown and not texts and not described:
            if len(shown) != 1:
                raise DataError(f"{len(shown)} images, expected one")
            if isinstance(shown[0], Image):
                return shown[0], " ".join(text)
    raise DataError("it is not a pair of an image and a text, which is what is ranked here")


def _parts(side: Conversation) -> tuple[list[Media], list[str]]:
    parts = [part for message in side for part in message.content]
    texts = [part for part in parts if isinstance(part, str) and part.strip()]
    return [part for part in parts if not isinstance(part, str)], texts


def _questions(file: Path) -> dict[str, tuple[SceneQuestion, ...]]:
    """Image path -> the questions about it. No file, no questions."""
    if not file.is_file():
        return {}
    check_is_content(file)
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); write the folder again") from error
    questions = {}
    for number, record in enumerate(records):
        try:
            questions[record["image"]] = tuple(_record_questions(record))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{file}, record {number}: not an image's questions ({error}); "
                "write the folder again"
            ) from error
    return questions


def _record_questions(record: dict[str, Any]) -> Iterator[SceneQuestion]:
    turns = [turn["value"] for turn in record["conversations"]]
    for kind, text, answer in zip(record["kinds"], turns[::2], turns[1::2], strict=True):
        yield SceneQuestion(kind, text.removeprefix("<image>\n"), answer)
