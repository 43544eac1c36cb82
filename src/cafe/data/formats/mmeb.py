r"""MMEB's own tables: pairs to train on, and queries with candidates to evaluate on.

One row of TIGER-Lab/MMEB-train (empty strings where there is no text or image):

    qry             "<|image_1|>\nRepresent the given image with the following question: What ..."
    qry_image_path  "images/A-OKVQA/Train/A-OKVQA_0.jpg"
    pos_text        "motorcycle"          pos_image_path  ""
    neg_text        ""                    neg_image_path  ""

One row of TIGER-Lab/MMEB-eval; the first candidate is the right one:

    qry_text        "<|image_1|>\nRepresent the given image for classification\n"
    qry_img_path    "ImageNet-1K/ILSVRC2012_val_00025129.JPEG"
    tgt_text        ["pug, pug-dog", "cab, hack, taxi, taxicab", ...]
    tgt_img_path    ["", "", ...]

Instructions are part of the text, so no embedding prompt is added (arXiv 2503.19900, MMEB mode).
`<|image_1|>` is where the image stands; blanks at the ends of texts are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cafe.data.formats.base import Format, pair_example
from cafe.data.media_paths import MediaResolver
from cafe.data.records import ReadOptions, Record, kind
from cafe.errors import DataError
from cafe.types import Conversation, Example, Part, user

EVALUATION_COLUMNS = frozenset({"qry_text", "qry_img_path", "tgt_text", "tgt_img_path"})

_MARKER = re.compile(r"<\|image_\d+\|>")


@dataclass(frozen=True, slots=True)
class Ranked:
    """A query and what to choose from.

    candidates   equal ones of a data set are the same object, so each need be embedded only once
    positives    which of them are right, as indices
    """

    id: str
    query: Conversation
    candidates: tuple[Conversation, ...]
    positives: tuple[int, ...]


def _read(
    identity: str, record: Record, media: MediaResolver, options: ReadOptions
) -> tuple[Example, ...]:
    query = _side(record, "qry", "qry_image_path", media)
    target = _side(record, "pos_text", "pos_image_path", media)
    negative = _side(record, "neg_text", "neg_image_path", media)
    for name, side in (("qry", query), ("pos_text", target)):
        if side is None:
            raise DataError(f"{name!r} is empty, and so is its image")
    assert query is not None
    assert target is not None
    negatives = () if negative is None else (negative,)
    return (pair_example(identity, query, target, options, negatives),)


MMEB = Format(
    name="mmeb",
    layout="qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path",
    columns=frozenset(
        {"qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path", "id"}
    ),
    fits=lambda columns: {"qry", "pos_text"} <= columns,
    modes=("pair",),
    pair_prompt="none",
    read=_read,
)


# ---------------------------------------------------------------------- evaluation


@dataclass(slots=True)
class RankedReader:
    """Rows of MMEB-eval -> `Ranked`. Candidates that come again are the same object."""

    media: MediaResolver
    _known: dict[tuple[Any, Any], Conversation] = field(default_factory=dict)

    def read(self, identity: str, record: Record) -> Ranked:
        """Raises DataError for a row that cannot be used."""
        query = _side(record, "qry_text", "qry_img_path", self.media)
        if query is None:
            raise DataError("'qry_text' is empty, and so is its image")
        candidates = tuple(self._candidates(record))
        if not candidates:
            raise DataError(
                "'tgt_text' is empty; a query needs candidates, the first of which is right"
            )
        return Ranked(identity, query, candidates, positives=(0,))

    def _candidates(self, record: Record) -> Iterator[Conversation]:
        texts, images = _listed(record, "tgt_text"), _listed(record, "tgt_img_path")
        if len(texts) != len(images):
            raise DataError(
                f"'tgt_text' has {len(texts)} candidates, 'tgt_img_path' has {len(images)}"
            )
        for number, key in enumerate(zip(texts, images, strict=True)):
            if key not in self._known:
                side = _built(*key, "tgt_text", self.media)
                if side is None:
                    raise DataError(f"candidate {number} has neither text nor image")
                self._known[key] = side
            yield self._known[key]


def _listed(record: Record, name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list):
        raise DataError(f"{name!r} is {kind(value)}, expected a list of candidates")
    return value


# ---------------------------------------------------------------------- one side


def _side(record: Record, text: str, value: str, media: MediaResolver) -> Conversation | None:
    return _built(record.get(text), record.get(value), text, media)


def _built(text: object, value: object, name: str, media: MediaResolver) -> Conversation | None:
    """Text and at most one image, at its marker or in front; None when there is neither."""
    if not isinstance(text, str | None):
        raise DataError(f"{name!r} is {kind(text)}, expected text")
    pieces = _MARKER.split(text or "")
    shown = media.images(value or None, name)
    if len(pieces) - 1 > len(shown):
        raise DataError(
            f"{name!r}: number of <|image_1|> markers is {len(pieces) - 1}, number of images is "
            f"{len(shown)}; they must be equal"
        )
    if shown and len(pieces) == 1:
        pieces = ["", *pieces]
    parts: list[Part] = [pieces[0].strip()]
    for image, piece in zip(shown, pieces[1:], strict=True):
        parts += [image, piece.strip()]
    content = [part for part in parts if part != ""]
    return user(*content) if content else None
