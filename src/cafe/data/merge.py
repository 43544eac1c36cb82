"""Examples about one image become branches of one example, so the image is encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from cafe.types import Conversation, Example, Image, Part


def merge_with_origin(examples: Sequence[Example]) -> list[tuple[int, Example]]:
    """Merge the examples of one task that show the same single image (equal `Image.key`).

    A merged example has the id and the position of the first of them, the first contrastive pair
    among them, and every dialogue once; one `Image` object is used for the image everywhere.
    Several captions of an image, which are different pairs, remain separate examples. They get one
    common `target_id`, because no caption of an image is a negative of another; dialogues of
    examples without a pair go to the first. Examples without an image, or with several images
    or a video, are unchanged.

    Returns:
        Each example with the index of the input example whose position it has.
    """
    groups: dict[object, list[int]] = {}
    images = [_only_image(example) for example in examples]
    for index, (example, image) in enumerate(zip(examples, images, strict=True)):
        key = ("alone", index) if image is None else (image.key, example.task)
        groups.setdefault(key, []).append(index)
    merged: list[tuple[int, Example]] = []
    for indices in groups.values():
        image = images[indices[0]]
        if image is None or len(indices) == 1:
            merged += [(index, examples[index]) for index in indices]
        else:
            merged += _merge([(index, examples[index]) for index in indices], image)
    return sorted(merged, key=lambda pair: pair[0])


@dataclass(slots=True)
class _Merged:
    """An example under construction."""

    index: int
    id: str
    example: Example
    dialogues: dict[object, Conversation] = field(default_factory=dict)


def _merge(members: Sequence[tuple[int, Example]], image: Image) -> list[tuple[int, Example]]:
    """One example per distinct pair; without any pair, one."""
    first_index, first = members[0]
    by_pair: dict[object, _Merged] = {}
    for index, example in members:
        if example.query is not None:
            by_pair.setdefault(_pair(example), _Merged(index, example.id, example))
    if not by_pair:
        by_pair[None] = _Merged(first_index, first.id, first)
    parts = list(by_pair.values())
    parts[0].index, parts[0].id = first_index, first.id

    for _, example in members:
        home = parts[0] if example.query is None else by_pair[_pair(example)]
        for dialogue in example.dialogues:
            home.dialogues.setdefault(_said(dialogue), _showing(dialogue, image))

    target_id = parts[0].example.target_id
    if len(parts) > 1:
        target_id = target_id or first.id
    return [(part.index, _finished(part, image, target_id)) for part in parts]


def _finished(part: _Merged, image: Image, target_id: str | None) -> Example:
    query, target = part.example.query, part.example.target
    return replace(
        part.example,
        id=part.id,
        query=None if query is None else _showing(query, image),
        target=None if target is None else _showing(target, image),
        query_thought=_thought(part.example.query_thought, image),
        target_thought=_thought(part.example.target_thought, image),
        negatives=tuple(_showing(negative, image) for negative in part.example.negatives),
        dialogues=tuple(part.dialogues.values()),
        target_id=target_id,
    )


def _thought(conversation: Conversation | None, image: Image) -> Conversation | None:
    return None if conversation is None else _showing(conversation, image)


def _only_image(example: Example) -> Image | None:
    """The image, when the example shows one and nothing else."""
    images: dict[object, Image] = {}
    for message in chain.from_iterable(example.conversations):
        for part in message.content:
            if isinstance(part, Image):
                images.setdefault(part.key, part)
            elif not isinstance(part, str):
                return None
    return next(iter(images.values())) if len(images) == 1 else None


def _pair(example: Example) -> object:
    """Equal for examples with the same contrastive pair, given that they show one image."""
    sides = (example.query or (), example.target or (), *example.negatives)
    return (example.embedding_prompt, *map(_said, sides))


def _said(conversation: Conversation) -> object:
    """Equal for conversations with the same texts, given that they show one image."""
    return tuple(
        (m.role, m.calls, tuple(part if isinstance(part, str) else None for part in m.content))
        for m in conversation
    )


def _showing(conversation: Conversation, image: Image) -> Conversation:
    """The conversation with every image replaced by `image`."""

    def part(old: Part) -> Part:
        return image if isinstance(old, Image) else old

    def showing(parts: tuple[Part, ...]) -> tuple[Part, ...]:
        return tuple(map(part, parts))

    return tuple(
        replace(
            m,
            content=showing(m.content),
            written=None if m.written is None else showing(m.written),
        )
        for m in conversation
    )
