"""Pictures with captions: an image folder's metadata, WebDataset samples, tables of two columns.

Records of `metadata.jsonl` (an image folder), of a tar archive, and of a table:

    {"file_name": "0001.png", "text": "A red mug on a table."}
    0001.jpg + 0001.txt
    {"image": {"bytes": …, "path": …}, "caption": ["A red mug.", "A mug on a table."]}

Several captions of a picture give as many examples, none of which is a negative of another. In a
dialogue the caption answers a fixed request. Format of the folder:
https://huggingface.co/docs/datasets/image_load#imagefolder.
"""

from __future__ import annotations

from typing import Any

from cafe.data.formats.base import Format
from cafe.data.pictures import Media, media_value
from cafe.data.records import Meaning, Record, kind
from cafe.errors import DataError
from cafe.types import Example, Message, user

REQUEST = "Describe this image."

_IMAGE = ("image", "file_name")
_CAPTION = ("caption", "captions", "text")
_OTHERS = {"conversations", "messages"}


def _read(identity: str, record: Record, media: Media, meaning: Meaning) -> tuple[Example, ...]:
    shown = media.images(media_value(record, *_IMAGE))
    if not shown:
        raise DataError("it has no picture")
    captions = _captions(media_value(record, *_CAPTION))
    several = len(captions) > 1
    examples: list[Example] = []
    for number, caption in enumerate(captions, 1):
        name = f"{identity}-{number}" if several else identity
        dialogue = (*user(*shown, REQUEST), Message("assistant", (caption,)))
        if meaning.mode == "chat":
            examples.append(Example(name, dialogues=(dialogue,), task=meaning.task))
            continue
        examples.append(
            Example(
                name,
                query=user(*shown),
                target=user(caption),
                dialogues=(dialogue,) if meaning.language_loss else (),
                target_id=identity if several else caption,
                task=meaning.task,
                embedding_prompt=meaning.embedding_prompt,
            )
        )
    return tuple(examples)


def _captions(value: object) -> list[str]:
    values: list[Any] = value if isinstance(value, list) else [value]
    for text in values:
        if not isinstance(text, str):
            raise DataError(f"its caption is {kind(text)}, expected text")
    captions = [text.strip() for text in values if text.strip()]
    if not captions:
        raise DataError("its caption is empty; write it, or leave the record out")
    return captions


CAPTIONS = Format(
    name="captions",
    layout="image (or file_name), caption (or text)",
    columns=frozenset({*_IMAGE, *_CAPTION, "id"}),
    fits=lambda columns: (
        bool(columns & {*_IMAGE}) and bool(columns & {*_CAPTION}) and not columns & _OTHERS
    ),
    modes=("caption", "chat"),
    pair_prompt="compress",
    read=_read,
)
