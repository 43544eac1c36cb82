"""Examples about one picture become branches of one example, so the picture is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from cafe.types import Conversation, Example, Image, Message, Part


def merge_by_image(examples: Sequence[Example]) -> list[Example]:
    """Merge the examples that show the same single picture (equal `Image.key`) and are one task.

    A merged example has the id and the place of the first of them, the first contrastive pair
    among them, and every dialogue once; one `Image` object stands for the picture everywhere.
    Several captions of a picture, which are different pairs, stay examples of their own. They get
    one common `target_id`, because no caption of a picture is a negative of another; dialogues of
    examples without a pair go to the first. Examples without a picture, or with several pictures
    or a video, stay as they are.
    """
    return [example for _, example in merge_with_origin(examples)]


def merge_with_origin(examples: Sequence[Example]) -> list[tuple[int, Example]]:
    """`merge_by_image`, and for each example the index of the one whose place it has."""
    groups: dict[object, list[int]] = {}
    pictures = [_only_picture(example) for example in examples]
    for index, (example, picture) in enumerate(zip(examples, pictures, strict=True)):
        key = ("alone", index) if picture is None else (picture.key, example.task)
        groups.setdefault(key, []).append(index)
    merged: list[tuple[int, Example]] = []
    for indices in groups.values():
        picture = pictures[indices[0]]
        if picture is None or len(indices) == 1:
            merged += [(index, examples[index]) for index in indices]
        else:
            merged += _merge([(index, examples[index]) for index in indices], picture)
    return sorted(merged, key=lambda pair: pair[0])


@dataclass(slots=True)
class _Merged:
    """An example in the making."""

    index: int
    id: str
    example: Example
    dialogues: dict[object, Conversation] = field(default_factory=dict)


def _merge(members: Sequence[tuple[int, Example]], picture: Image) -> list[tuple[int, Example]]:
    """One example per different pair; without any pair, one."""
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
            home.dialogues.setdefault(_said(dialogue), _showing(dialogue, picture))

    target_id = parts[0].example.target_id
    if len(parts) > 1:
        target_id = target_id or first.id
    return [(part.index, _finished(part, picture, target_id)) for part in parts]


def _finished(part: _Merged, picture: Image, target_id: str | None) -> Example:
    query, target = part.example.query, part.example.target
    return replace(
        part.example,
        id=part.id,
        query=None if query is None else _showing(query, picture),
        target=None if target is None else _showing(target, picture),
        negatives=tuple(_showing(negative, picture) for negative in part.example.negatives),
        dialogues=tuple(part.dialogues.values()),
        target_id=target_id,
    )


def _only_picture(example: Example) -> Image | None:
    """The picture, when the example shows one and nothing else."""
    sides = [side for side in (example.query, example.target) if side is not None]
    found: dict[object, Image] = {}
    for message in chain.from_iterable((*sides, *example.negatives, *example.dialogues)):
        for part in message.content:
            if isinstance(part, Image):
                found.setdefault(part.key, part)
            elif not isinstance(part, str):
                return None
    return next(iter(found.values())) if len(found) == 1 else None


def _pair(example: Example) -> object:
    """Equal for examples with the same contrastive pair, given that they show one picture."""
    sides = (example.query or (), example.target or (), *example.negatives)
    return (example.embedding_prompt, *map(_said, sides))


def _said(conversation: Conversation) -> object:
    """Equal for conversations that say the same, given that they show one picture."""
    return tuple(
        (m.role, tuple(part if isinstance(part, str) else None for part in m.content))
        for m in conversation
    )


def _showing(conversation: Conversation, picture: Image) -> Conversation:
    """The conversation with `picture` in every place that shows one."""

    def part(old: Part) -> Part:
        return picture if isinstance(old, Image) else old

    return tuple(Message(m.role, tuple(map(part, m.content))) for m in conversation)
