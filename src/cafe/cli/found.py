"""The generative half of a search: the model judges the hits, and answers from them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np

from cafe.errors import DataError
from cafe.types import Hit, Image, Part, user

if TYPE_CHECKING:
    from cafe.index import Origin
    from cafe.model.vlm import CAFe

_NUMBER = re.compile(r"\[(\d+)\]")

_ASK = (
    "{question}\nAnswer from the sources above only, and name the numbers of those that you use in "
    "square brackets, such as [1]."
)

ONE_PICTURE = (
    "this model was not trained on several pictures: it answers about the best hit only, and has "
    "not seen the others"
)


@dataclass(frozen=True, slots=True)
class Found:
    """A hit. `file` is the path of its picture.

    match      how probable the model finds that the picture shows what the text says
    posterior  how probable it is that this is the hit meant, by `match` and by the cosine
    Both are None where the model was not asked (`cafe.model.rerank`).
    """

    hit: Hit
    file: str | None
    match: float | None = None
    posterior: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """`sources` are numbers of hits, from 1; `note` says what the reader must know."""

    text: str
    sources: list[int]
    note: str | None = None


def reranked(
    vlm: CAFe,
    origin: Origin | None,
    query: str | Image | None,
    hits: Sequence[Hit],
    best: int | None,
) -> list[Found]:
    """Hits with their files; the `best` first of them judged, and ordered by their posterior.

    query   a text is compared with pictures, a picture with texts
    Raises DataError when the hits are of the query's own kind, or a file is gone.
    """
    found = [Found(hit, _file(hit, origin)) for hit in hits]
    if best is None or query is None:
        return found
    judged = found[:best]
    kind = "image" if isinstance(query, str) else "text"
    if any(one.hit.metadata.get("kind") != kind for one in judged):
        raise DataError(
            "--rerank compares a text with pictures, or a picture with texts, and some hits are of "
            f"the other kind; add --where \"kind = '{kind}'\""
        )
    if not judged:
        return found
    cosines = np.array([one.hit.score for one in judged])
    match, posterior = vlm.rerank(query, [_part(one) for one in judged], cosines)
    return [
        Found(judged[i].hit, judged[i].file, float(match[i]), float(posterior[i]))
        for i in np.argsort(-posterior, kind="stable")
    ] + found[best:]


def answered(vlm: CAFe, question: str, found: Sequence[Found]) -> Answer:
    """The model's answer to `question` from the hits, which it is shown as numbered sources."""
    if knows_one_picture(vlm):
        text = str(vlm.generate(user(_part(found[0]), question)))
        return Answer(f"{text} [1]", [1], ONE_PICTURE)
    parts: list[Part] = []
    for number, one in enumerate(found, 1):
        part = _part(one)
        name = "Picture" if isinstance(part, Image) else "Text"
        parts += [f"{name} [{number}]: ", part, "\n"]
    text = str(vlm.generate(user(*parts, _ASK.format(question=question))))
    named = sorted({int(n) for n in _NUMBER.findall(text)} & set(range(1, len(found) + 1)))
    if named:
        return Answer(text, named)
    everything = list(range(1, len(found) + 1))
    return Answer(
        text, everything, "the answer names no source; these are what the model was given"
    )


def knows_one_picture(vlm: CAFe) -> bool:
    """Whether the model is tiny, or grew from it: no other has a tower of 96 pixels."""
    from cafe.model.tiny import IMAGE_PIXELS

    vision = getattr(vlm.model.config, "vision_config", None)
    return getattr(vision, "image_size", None) == IMAGE_PIXELS


def _file(hit: Hit, origin: Origin | None) -> str | None:
    """Where the picture is; None when it is no file of the index's own folder."""
    path = hit.metadata.get("path")
    if path is None or origin is None or origin.root is None:
        return None
    if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
        return None  # somebody else's index may say what it likes
    return str(Path(origin.root, path))


def _part(one: Found) -> str | Image:
    """What the model is shown of a hit. Raises DataError when its picture cannot be opened."""
    if one.hit.metadata.get("kind") == "text":
        return str(one.hit.metadata.get("text", ""))
    if one.file is None:
        raise DataError(
            f"hit {one.hit.id!r}: its picture is no file of an indexed folder, so the model cannot "
            "look at it again; index a folder of pictures"
        )
    if not Path(one.file).is_file():
        raise DataError(f"hit {one.hit.id!r}: {one.file} is gone; update the index: cafe index")
    return Image(one.file)
