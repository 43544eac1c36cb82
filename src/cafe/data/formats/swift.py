"""Contrastive records of ms-swift: messages of a query, its positives and its negatives.

One record; `<image>` takes the next image of the list:

    {"messages": [{"role": "user", "content": "<image>Find the same mug."}], "images": ["q.jpg"],
     "positive_messages": [[{"role": "user", "content": "<image>"}]],
     "positive_images": [["p.jpg"]],
     "negative_messages": [[{"role": "user", "content": "A blue cup."}]], "negative_images": [[]]}

Several positives give as many examples, none of which is a negative of another. Format:
https://swift.readthedocs.io/en/latest/BestPractices/Embedding.html.
"""

from __future__ import annotations

from cafe.data.formats.base import Format, pair_example
from cafe.data.formats.turns import ListedMedia, read_conversation
from cafe.data.media_paths import MediaResolver
from cafe.data.records import ReadOptions, Record, kind
from cafe.errors import DataError
from cafe.types import Conversation, Example


def _read(
    identity: str, record: Record, media: MediaResolver, options: ReadOptions
) -> tuple[Example, ...]:
    query = _side(record.get("messages"), record.get("images"), media, "messages")
    positives = _sides(record, "positive", media)
    if not positives:
        raise DataError("'positive_messages' is empty; a pair needs a target")
    negatives = _sides(record, "negative", media)
    several = len(positives) > 1
    return tuple(
        pair_example(
            f"{identity}-{number}" if several else identity,
            query,
            positive,
            options,
            negatives,
            target_id=identity if several else None,
        )
        for number, positive in enumerate(positives, 1)
    )


def _sides(record: Record, name: str, media: MediaResolver) -> list[Conversation]:
    """The conversations of `positive_messages` or `negative_messages`, each with its images."""
    field = f"{name}_messages"
    listed = record.get(field) or []
    image_lists = record.get(f"{name}_images") or [None] * len(listed)
    for key, value in ((field, listed), (f"{name}_images", image_lists)):
        if not isinstance(value, list):
            raise DataError(f"{key!r} is {kind(value)}, expected a list of lists")
    if len(image_lists) != len(listed):
        raise DataError(
            f"{field!r} has {len(listed)} entries and '{name}_images' has {len(image_lists)}; "
            "write one list of images, which may be empty, for each"
        )
    return [
        _side(messages, images, media, f"{field} {number}")
        for number, (messages, images) in enumerate(zip(listed, image_lists, strict=True), 1)
    ]


def _side(messages: object, images: object, media: MediaResolver, field: str) -> Conversation:
    shown = ListedMedia(media.images(images or None, "images"))
    return read_conversation(messages, shown, media, field=field, parts=True)


SWIFT = Format(
    name="swift",
    layout="messages, images, positive_messages, positive_images, negative_messages, …",
    columns=frozenset(
        {"messages", "images", "id"}
        | {f"{side}_{what}" for side in ("positive", "negative") for what in ("messages", "images")}
    ),
    fits=lambda columns: {"messages", "positive_messages"} <= columns,
    modes=("pair",),
    pair_prompt="compress",
    read=_read,
)
