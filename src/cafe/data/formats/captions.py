"""Images or recordings with captions: a folder's metadata, WebDataset samples, caption files.

Records of `metadata.jsonl` (an image folder), of a tar archive, and of a table; those of the files
in `cafe.data.tables.captions` and `cafe.data.tables.published` are like the last:

    {"file_name": "0001.png", "text": "A red mug on a table."}
    0001.jpg + 0001.txt
    {"image": {"bytes": …, "path": …}, "caption": ["A red mug.", "A mug on a table."]}
    {"audio": {"bytes": …, "path": …}, "caption": "A dog barks."}

A column `negatives` holds wrong captions that are nearly right, as texts (hard negatives).
Several captions of an image give as many examples, none of which is a negative of another. In a
dialogue the caption answers a fixed request. Format of the folder:
https://huggingface.co/docs/datasets/image_load#imagefolder.
"""

from __future__ import annotations

from typing import Any

from cafe.audio import is_audio_name
from cafe.data.columns import AUDIO, CAPTION, IMAGE
from cafe.data.formats.base import NEGATIVES, Format, negative_captions
from cafe.data.media_paths import MediaResolver, media_value
from cafe.data.records import ReadOptions, Record, kind
from cafe.errors import DataError
from cafe.types import AUDIO_CAPTION_REQUEST, CAPTION_REQUEST, Audio, Example, Image, Message, user

_OTHERS = {"conversations", "messages"}


def _read(
    identity: str, record: Record, media: MediaResolver, options: ReadOptions
) -> tuple[Example, ...]:
    shown = _shown(record, media)
    if not shown:
        raise DataError("it has no image")
    request = CAPTION_REQUEST if isinstance(shown[0], Image) else AUDIO_CAPTION_REQUEST
    captions = _captions(media_value(record, *CAPTION))
    several = len(captions) > 1
    negatives = negative_captions(record)
    examples: list[Example] = []
    for number, caption in enumerate(captions, 1):
        name = f"{identity}-{number}" if several else identity
        dialogue = (*user(*shown, request), Message("assistant", (caption,)))
        if options.mode == "chat":
            examples.append(Example(name, dialogues=(dialogue,), task=options.task))
            continue
        examples.append(
            Example(
                name,
                query=user(*shown),
                target=user(caption),
                negatives=negatives,
                dialogues=(dialogue,) if options.language_loss else (),
                target_id=identity if several else caption,
                task=options.task,
                embedding_prompt=options.prompt,
            )
        )
    return tuple(examples)


def _shown(record: Record, media: MediaResolver) -> tuple[Image | Audio, ...]:
    """The images of a record, then its recordings; `file_name` may name either."""
    value, sounds = media_value(record, *IMAGE), media_value(record, *AUDIO)
    if isinstance(value, str) and is_audio_name(value):
        value, sounds = None, value
    return (*media.images(value), *media.recordings(sounds))


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
    columns=frozenset({*IMAGE, *AUDIO, *CAPTION, *NEGATIVES, "id"}),
    fits=lambda columns: (
        bool(columns & {*IMAGE, *AUDIO}) and bool(columns & {*CAPTION}) and not columns & _OTHERS
    ),
    modes=("caption", "chat"),
    pair_prompt="compress",
    read=_read,
)
