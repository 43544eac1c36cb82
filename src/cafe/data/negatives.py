r"""Pairs, the candidates for hard negatives of their queries, and the file of the result.

One record, in ms-swift's embedding format (its data loader, and this package's, read it):

    {"id": "1", "messages": [{"role": "user", "content": "<image>"}], "images": ["1.jpg"],
     "positive_messages": [[{"role": "user", "content": "a red mug"}]], "positive_images": [[]],
     "negative_messages": [[{"role": "user", "content": "a blue mug"}]], "negative_images": [[]],
     "scores": [0.81, 0.74]}

`id` is that of the pair in the data it came from, so that thoughts and groups that were written for
those fit this file, too. `scores` are the cosines of the positive and of each negative, which
`data.*.scores` of a recipe reads; others leave the column out.
Format: https://swift.readthedocs.io, "Embedding training". Each `<image>` is the position of an
image. The format cannot contain answers (dialogues): keep the first file as a second source of the
recipe, in `mode: chat`, and set `merge_by_image: true`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cafe.errors import DataError, quoted
from cafe.files import inside
from cafe.types import Audio, Conversation, Example, Image, Part, Video

_MARKER = "<image>"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Contrastive pairs, with every query and every target once.

    examples   the pairs, in their order
    queries    distinct queries
    query_of   index of the query of each pair
    targets    distinct targets
    relevant   for each pair the indices of its correct targets: its own first, then those of equal
               target id and those of other pairs with the same query
    """

    examples: list[Example]
    queries: list[Conversation]
    query_of: list[int]
    targets: list[Conversation]
    relevant: list[list[int]]


def collect_pairs(examples: Sequence[Example]) -> Pairs:
    """The pairs among `examples`. Raises DataError if there are none."""
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
    """Each conversation once, in order of appearance, and the index of each input among them."""
    indices: dict[Hashable, int] = {}
    kept: list[Conversation] = []
    numbers = []
    for conversation in conversations:
        key = tuple((m.role, *(_key(part) for part in m.content)) for m in conversation)
        if key not in indices:
            indices[key] = len(kept)
            kept.append(conversation)
        numbers.append(indices[key])
    return kept, numbers


def _key(part: Part) -> Hashable:
    return part if isinstance(part, str) else (type(part).__name__, part.key)


def swift_record(
    example: Example, negatives: Sequence[Conversation], image_root: Path
) -> dict[str, Any]:
    """The record of a pair and its negatives. Image paths are relative to `image_root`.

    Raises:
        DataError: The format cannot contain a part: an image that is no file below `image_root`,
            a video, or the text `<image>`.
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
        "id": example.id,
        "messages": messages,
        "images": images,
        "positive_messages": [positive[0]],
        "positive_images": [positive[1]],
        "negative_messages": [side[0] for side in others],
        "negative_images": [side[1] for side in others],
        **({} if example.scores is None else {"scores": list(example.scores)}),
    }


def _sides(conversation: Conversation, root: Path) -> tuple[list[dict[str, str]], list[str]]:
    images = [_path(p, root) for m in conversation for p in m.content if isinstance(p, Image)]
    messages = [
        {"role": m.role, "content": "".join(_text(part) for part in m.content)}
        for m in conversation
    ]
    return messages, images


def _text(part: Part) -> str:
    if isinstance(part, Video | Audio):
        what = "a video" if isinstance(part, Video) else "audio"
        raise DataError(f"it contains {what}, which cannot be written in this format")
    if isinstance(part, Image):
        return _MARKER
    if _MARKER in part:
        raise DataError(f"its text contains {_MARKER}, which would be read as an image")
    return part


def _path(image: Image, root: Path) -> str:
    if not isinstance(image.source, str | Path):
        raise DataError("an image is not a file; save it and name its path")
    path = Path(image.source).absolute()
    file = inside(root, str(path))
    if file is None:
        raise DataError(f"image {quoted(str(path))} is outside {root}; give --image-root")
    return file.relative_to(root.resolve()).as_posix()
