"""Converts what users pass in (strings, images, dicts, chat messages) into conversations."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import PIL.Image
import torch

from cafe.audio import is_audio_name
from cafe.errors import DataError
from cafe.model.quantization import EmbeddingPrecision
from cafe.types import Audio, Conversation, Image, Message, Part

Input = str | Path | PIL.Image.Image | Image | Audio | Message | Mapping[str, Any] | Sequence[Any]
Inputs = Sequence[Input] | Input


class EncodeOptions(TypedDict, total=False):
    """The options of `CAFe.encode` that do not change the type of its result."""

    batch_size: int
    normalize: bool
    truncate_dim: int | None
    prompt_name: str
    precision: EmbeddingPrecision
    ranges: np.ndarray | None
    caption: bool | Sequence[str | None]
    caption_weight: float
    think: int | Sequence[str | None]
    devices: Sequence[str | torch.device]
    show_progress_bar: bool


def as_conversation(value: Input) -> Conversation:
    """One input as a conversation.

    str                    text, always: a path is a `Path`, so no string can read a file
    Path, PIL, `Image`     an image; a Path that ends as audio files do (.wav, .mp3): audio
    `Audio`                a recording, for models that hear
    {"text", "image", "audio"}    what it has, image(s) first, then recording(s)
    {"role", "content"}    a chat message, as OpenAI and transformers write it
    `Message`              the same
    a list or tuple of messages    one conversation

    Raises:
        DataError: anything else.
    """
    match value:
        case str():
            return (Message("user", (value,)),)
        case Path() | PIL.Image.Image() | Image() | Audio():
            return (Message("user", (_media(value),)),)
        case Message() | {"role": _, "content": _}:
            return (_message(value),)
        case {"text": _} | {"image": _} | {"audio": _}:
            return (Message("user", _mapping_parts(value)),)
        case [*messages] if messages and all(_is_message(m) for m in messages):
            return tuple(_message(m) for m in messages)
    raise DataError(
        f"cannot read an input of type {type(value).__name__}: give a string, an image "
        '(PIL image or Path), Audio, {"text": …, "image": …, "audio": …}, or chat messages'
    )


def as_messages(value: Any) -> list[Conversation]:
    """One input or several (`is_many`), as conversations."""
    return [as_conversation(item) for item in (value if is_many(value) else [value])]


def is_many(value: Any) -> bool:
    """Whether `value` is several inputs: a list, tuple or array, unless of chat messages only."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        return False
    return len(value) == 0 or not all(_is_message(item) for item in value)


def _is_message(value: Any) -> bool:
    return isinstance(value, Message) or (
        isinstance(value, Mapping) and "role" in value and "content" in value
    )


def _message(value: Any) -> Message:
    if isinstance(value, Message):
        return value
    role, content = value["role"], value["content"]
    if role not in ("system", "user", "assistant"):
        raise DataError(f"message role {role!r}: use system, user or assistant")
    if not isinstance(content, str | list | tuple):
        raise DataError(f"message content of type {type(content).__name__}: give text or parts")
    parts = (content,) if isinstance(content, str) else tuple(_part(part) for part in content)
    return Message(role, parts)


def _part(value: Any) -> Part:
    match value:
        case str():
            return value
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image", "image": image} | {"type": "image", "path": image}:
            return _image(image)
        case {"type": "audio", "audio": audio} | {"type": "audio", "path": audio}:
            return _audio(audio)
        case {"type": "input_audio", "input_audio": {"data": str(data)}}:
            return Audio(_from_base64(data))
        case {"type": "input_audio", "input_audio": {"data": data}}:
            return _audio(data)
        case PIL.Image.Image() | Image() | Path() | Audio():
            return _media(value)
    raise DataError(
        f"message part {str(value)[:80]!r}: use {{'type': 'text', 'text': …}}, "
        "{'type': 'image', 'image': …} or {'type': 'audio', 'audio': …}"
    )


def _mapping_parts(value: Mapping[str, Any]) -> tuple[Part, ...]:
    unknown = set(value) - {"text", "image", "audio"}
    if unknown:
        raise DataError(f"input key {sorted(unknown)[0]!r} is unknown: use text, image and audio")
    images, text = _listed(value.get("image")), value.get("text")
    recordings = _listed(value.get("audio"))
    if not isinstance(text, str | None):
        raise DataError(f"input key 'text' of type {type(text).__name__}: give a string")
    if not images and not recordings and text is None:
        raise DataError("an input has neither text nor image; give one of them")
    parts: list[Part] = [_image(image) for image in images]
    parts += [_audio(recording) for recording in recordings]
    if text or (text is not None and not parts):
        parts.append(text)
    return tuple(parts)


def _listed(value: Any) -> Sequence[Any]:
    if value is None:
        return []
    return value if isinstance(value, list | tuple) else [value]


def _media(value: Any) -> Image | Audio:
    if isinstance(value, Audio) or (isinstance(value, Path) and is_audio_name(value.name)):
        return _audio(value)
    return _image(value)


def _from_base64(data: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise DataError(f"input_audio: its data are no base64 ({error})") from error


def _audio(value: Any) -> Audio:
    """A recording, its path, or its encoded bytes."""
    if isinstance(value, Audio):
        return value
    if isinstance(value, str | Path | bytes):
        return Audio(value)
    raise DataError(
        f"audio of type {type(value).__name__}: give cafe.Audio, a path or bytes; samples need "
        "their rate: Audio(samples, rate=16_000)"
    )


def _image(value: Any) -> Image:
    if isinstance(value, Image):
        return value
    if isinstance(value, str | Path | bytes | PIL.Image.Image):
        return Image(value)
    raise DataError(f"an image of type {type(value).__name__}: give a PIL image, a path or bytes")
