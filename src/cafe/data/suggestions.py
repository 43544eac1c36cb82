"""What records of no known format look like, and the column map that would make them of one.

Judged by what the columns contain, and by their names where several contain the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import mean
from typing import Any

from cafe.data.columns import is_image_name
from cafe.data.records import Record
from cafe.types import StoredFile

_CAPTION_HINTS = ("caption", "text", "title", "description", "comment", "sentence", "alt", "prompt")
_IMAGE_HINTS = ("image", "img", "photo", "pic", "file", "path", "url")
_QUERY_HINTS = ("query", "question", "anchor", "source", "sentence1", "text1", "premise", "left")
_SHOWN = 20  # columns

_KINDS = {
    "image": "images",
    "text": "texts",
    "word": "words",
    "conversations": "conversations with from, value",
    "messages": "messages with role, content",
    "other": "other values",
}


def suggestion(records: Sequence[Record]) -> str | None:
    """What the columns hold and, where that is like a format, its column map; None: no columns."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    if not columns:
        return None
    kinds = {name: _kind([record.get(name) for record in records]) for name in columns}
    held = ", ".join(f"{name} ({_KINDS[kind]})" for name, kind in list(kinds.items())[:_SHOWN])
    found = _map(records, kinds)
    if found is None:
        return f"They hold {held}, which is like no format"
    format, mapping = found
    written = ", ".join(f"{name}: {column}" for name, column in mapping.items())
    return f"They hold {held}. The nearest format is {format}: try columns: {{{written}}}"


def _map(records: Sequence[Record], kinds: dict[str, str]) -> tuple[str, dict[str, str]] | None:
    """The name of the nearest format, and its column map."""

    def ranked(hints: Sequence[str], *wanted: str) -> list[str]:
        """The columns of the first of these kinds that there is, the likeliest in front."""
        for kind in wanted:
            if found := [name for name, own in kinds.items() if own == kind]:
                return sorted(found, key=lambda name: _unlikely(name, hints, records))
        return []

    images = ranked(_IMAGE_HINTS, "image")
    for format, name in (("llava", "conversations"), ("messages", "messages")):
        if turns := ranked((), name):
            shown = {"image": images[0]} if images and format == "llava" else {}
            return format, {name: turns[0], **shown}
    texts = ranked(_CAPTION_HINTS, "text", "word")
    if images and texts:
        return "captions", {"image": images[0], "caption": texts[0]}
    sides = images or ranked(_QUERY_HINTS, "text")
    if len(sides) > 1:
        return "pairs", {"anchor": sides[0], "positive": sides[1]}
    return None


def _unlikely(name: str, hints: Sequence[str], records: Sequence[Record]) -> tuple[int, float]:
    """Sorts columns: first those named like a hint, then those with the longest texts."""
    hint = next((i for i, hint in enumerate(hints) if hint in name.lower()), len(hints))
    lengths = [len(v) for record in records if isinstance(v := record.get(name), str)]
    return hint, -mean(lengths) if lengths else 0.0


def _kind(values: Sequence[Any]) -> str:
    """What most of the values are that are there."""
    given = [v[0] if isinstance(v, list) and v and not _is_turn(v[0]) else v for v in values]
    kinds = Counter(_kind_of(v) for v in given if v not in (None, "", [], {}))
    return kinds.most_common(1)[0][0] if kinds else "other"


def _kind_of(value: Any) -> str:
    match value:
        case bytes() | StoredFile() | {"bytes": _} | {"path": _}:
            return "image"
        case [{"from": _, "value": _}, *_]:
            return "conversations"
        case [{"role": _, "content": _}, *_]:
            return "messages"
        case str() if is_image_name(value):
            return "image"
        case str():
            return "text" if len(value.split()) > 1 else "word"
    return "other"


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and bool({"from", "role"} & set(value))
