"""Columns of pairs, as sentence-transformers names them, and FlagEmbedding's.

Two records; a value is text, the path of an image, an image as the `datasets` library stores it,
or text and image together:

    {"anchor": "a red mug", "positive": "mug.jpg", "negative_1": "cup.jpg", "negative_2": "a cat"}
    {"query": {"text": "in blue", "image": "mug.jpg"}, "pos": ["blue-mug.jpg"], "neg": ["cat.jpg"]}

`anchor` is also named `query`; `positive` also `pos` or `target`; `negative` also `negatives` or
`neg`, and a number may follow. A column of the same name with `_image` behind it holds images
only (`query_image`), and with `_audio` recordings; a name that ends as an audio file's is one, too.
A list in `positive` gives as many examples, none of which is a negative of another. Format: https://sbert.net/docs/sentence_transformer/training_overview.html.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cafe.audio import is_audio_name
from cafe.data.formats.base import Format, pair_example
from cafe.data.media_paths import MediaResolver
from cafe.data.records import ReadOptions, Record, kind
from cafe.errors import DataError
from cafe.types import Conversation, Example, Part, StoredFile, user

_QUERY = ("anchor", "query")
_TARGET = ("positive", "pos", "target")
_NEGATIVE = re.compile(r"(?P<side>(negatives?|neg)(_\d+)?)(_image|_audio)?")
_KINDS = ("_image", "_audio")


def _read(
    identity: str, record: Record, media: MediaResolver, options: ReadOptions
) -> tuple[Example, ...]:
    queries = list(_sides(record, _QUERY, media))
    targets = list(_sides(record, _TARGET, media))
    if len(queries) != 1:
        raise DataError(f"the query must be one, found {len(queries)}")
    if not targets:
        raise DataError("the positive is empty")
    names = dict.fromkeys(m["side"] for name in record if (m := _NEGATIVE.fullmatch(name)))
    negatives = [side for name in names for side in _sides(record, (name,), media)]
    several = len(targets) > 1
    return tuple(
        pair_example(
            f"{identity}-{number}" if several else identity,
            queries[0],
            target,
            options,
            negatives,
            target_id=identity if several else None,
        )
        for number, target in enumerate(targets, 1)
    )


def _sides(record: Record, names: tuple[str, ...], media: MediaResolver) -> Iterator[Conversation]:
    """What the first filled column of `names`, and its image column, contain."""
    for name in names:
        text, image = record.get(name), record.get(f"{name}_image")
        audio = record.get(f"{name}_audio")
        if text is None and image is None and audio is None:
            continue
        values = text if isinstance(text, list) else [text]
        for value in values:
            shown = media.images(image or None, f"{name}_image")
            heard = media.recordings(audio or None, f"{name}_audio")
            content = (*shown, *heard, *_parts(value, name, media))
            if content:
                yield user(*content)
        return


def _parts(value: object, name: str, media: MediaResolver) -> tuple[Part, ...]:
    match value:
        case None:
            return ()
        case str():
            if media.looks_like_image(value):
                return (media.image(value, name),)
            if " " not in value and is_audio_name(value):
                return (media.recording(value, name),)
            return (value,) if value.strip() else ()
        case bytes() | StoredFile() | {"bytes": _} | {"path": _}:
            return (media.image(value, name),)
        case {"text": text, "audio": audio}:
            return (*media.recordings(audio, name), *_parts(text, name, media))
        case {"text": text, "image": image}:
            return (*media.images(image, name), *_parts(text, name, media))
    raise DataError(f"{name!r} holds {kind(value)}, expected text or an image")


def _fits(columns: frozenset[str]) -> bool:
    return all(
        any(f"{name}{kind}" in columns for name in names for kind in ("", *_KINDS))
        for names in (_QUERY, _TARGET)
    )


_NAMES = (
    *_QUERY,
    *_TARGET,
    "negative",
    "negatives",
    "neg",
    *(f"negative_{n}" for n in range(1, 9)),
)

PAIRS = Format(
    name="pairs",
    layout="anchor (or query), positive (or pos, target), negative, negative_1, …",
    columns=frozenset({"id", *_NAMES, *(f"{name}{kind}" for name in _NAMES for kind in _KINDS)}),
    fits=_fits,
    modes=("pair",),
    pair_prompt="compress",
    read=_read,
)
