r"""Pairs, the targets that may be hard negatives of their queries, and the file of the result.

One record, in ms-swift's embedding format (its data loader, and this package's, read it):

    {"messages": [{"role": "user", "content": "<image>"}], "images": ["1.jpg"],
     "positive_messages": [[{"role": "user", "content": "a red mug"}]], "positive_images": [[]],
     "negative_messages": [[{"role": "user", "content": "a blue mug"}]], "negative_images": [[]]}

Format: https://swift.readthedocs.io, "Embedding training". Each `<image>` is where a picture
stands. Answers (dialogues) have no place in it: keep the first file as a second source of the
recipe, in `mode: chat`, and set `merge_by_image: true`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cafe.errors import DataError
from cafe.types import Conversation, Example, Image, Part, Video

_MARKER = "<image>"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Contrastive pairs, with every query and every target once.

    examples   the pairs, in their order
    queries    different queries;  query_of   the query of each pair
    targets    different targets;  relevant   for each pair the targets that are right: its own
               first, then those of equal target id and those of other pairs with the same query
    """

    examples: list[Example]
    queries: list[Conversation]
    query_of: list[int]
    targets: list[Conversation]
    relevant: list[list[int]]


def collect_pairs(examples: Sequence[Example]) -> Pairs:
    """The pairs among `examples`. Raises DataError when there is none."""
    pairs = [e for e in examples if e.query is not None and e.target is not None]
    if not pairs:
        raise DataError("no example is a pair of a query and a target; nothing can be mined")
    queries, query_of = _distinct([e.query for e in pairs if e.query is not None])
    targets, target_of = _distinct([e.target for e in pairs if e.target is not None])
    by_query: dict[int, dict[int, None]] = {}
    by_id: dict[str, dict[int, None]] = {}
    for example, query, target in zip(pairs, query_of, target_of, strict=True):
        by_query.setdefault(query, {})[target] = None
        if example.target_id is not None:
            by_id.setdefault(example.target_id, {})[target] = None
    relevant = [
        list({target: None} | by_query[query] | by_id.get(example.target_id or "", {}))
        for example, query, target in zip(pairs, query_of, target_of, strict=True)
    ]
    return Pairs(pairs, queries, query_of, targets, relevant)


def _distinct(conversations: Sequence[Conversation]) -> tuple[list[Conversation], list[int]]:
    """Each conversation once, in order of appearance; for each given one, which of them it is."""
    places: dict[Hashable, int] = {}
    kept: list[Conversation] = []
    numbers = []
    for conversation in conversations:
        key = tuple((m.role, *(_key(part) for part in m.content)) for m in conversation)
        if key not in places:
            places[key] = len(kept)
            kept.append(conversation)
        numbers.append(places[key])
    return kept, numbers


def _key(part: Part) -> Hashable:
    return part if isinstance(part, str) else (type(part).__name__, part.key)


def swift_record(
    example: Example, negatives: Sequence[Conversation], image_root: Path
) -> dict[str, Any]:
    """The record of a pair and its negatives. Picture paths are relative to `image_root`.

    Raises DataError for a part that the format cannot hold: a picture that is no file below
    `image_root`, a video, or the text `<image>`.
    """
    assert example.query is not None
    assert example.target is not None
    try:
        messages, images = _sides(example.query, image_root)
        positive = _sides(example.target, image_root)
        others = [_sides(negative, image_root) for negative in negatives]
    except DataError as error:
        raise DataError(f"example {example.id!r}: {error}") from error
    return {
        "messages": messages,
        "images": images,
        "positive_messages": [positive[0]],
        "positive_images": [positive[1]],
        "negative_messages": [side[0] for side in others],
        "negative_images": [side[1] for side in others],
    }


def _sides(conversation: Conversation, root: Path) -> tuple[list[dict[str, str]], list[str]]:
    images = [_path(p, root) for m in conversation for p in m.content if isinstance(p, Image)]
    messages = [
        {"role": m.role, "content": "".join(_text(part) for part in m.content)}
        for m in conversation
    ]
    return messages, images


def _text(part: Part) -> str:
    if isinstance(part, Video):
        raise DataError("it shows a video, which this format is not written with")
    if isinstance(part, Image):
        return _MARKER
    if _MARKER in part:
        raise DataError(f"its text holds {_MARKER}, which would be taken for a picture")
    return part


def _path(image: Image, root: Path) -> str:
    if not isinstance(image.source, str | Path):
        raise DataError("a picture is not a file; save it and name its path")
    path = Path(image.source)
    try:
        return path.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        raise DataError(f"picture {str(path)!r} is outside {root}; give --image-root") from None
