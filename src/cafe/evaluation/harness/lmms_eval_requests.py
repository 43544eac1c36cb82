"""Converts lmms-eval's requests to this package's types. Nothing here imports lmms-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import PIL.Image

from cafe.errors import DataError
from cafe.types import Conversation, Image, Message, Part, Role, Video, user

PLACEHOLDER = "<image>"
MAX_NEW_TOKENS = 1024
"""Used where a task sets no maximum."""


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How an answer is generated.

    sampling   for transformers' `generate`; empty: greedy
    until      the answer ends before the first of these
    """

    max_new_tokens: int
    sampling: tuple[tuple[str, Any], ...] = ()
    until: tuple[str, ...] = ()

    def cut(self, text: str) -> str:
        ends = [start for stop in self.until if (start := text.find(stop)) >= 0]
        return text[: min(ends)].rstrip() if ends else text


def settings_of(task: Mapping[str, Any]) -> GenerationSettings:
    """A task's `generation_kwargs`. A temperature above 0 samples, unless `do_sample` is false.

    Keys that concern the images of other models (image_aspect_ratio) are ignored.
    """
    until = task.get("until") or ()
    temperature = float(task.get("temperature") or 0)
    sampling: dict[str, Any] = {}
    if temperature > 0 and task.get("do_sample", True):
        sampling = {"do_sample": True, "temperature": temperature}
        sampling |= {key: task[key] for key in ("top_p", "top_k") if task.get(key) is not None}
    if (task.get("num_beams") or 1) > 1:
        sampling["num_beams"] = int(task["num_beams"])
    return GenerationSettings(
        int(task.get("max_new_tokens") or task.get("max_gen_toks") or MAX_NEW_TOKENS),
        tuple(sampling.items()),
        tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
    )


def conversation_of(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Chat messages of lmms-eval: {"role", "content": [{"type": "image", "url": PIL or path}, …]}.

    Raises:
        DataError: a part that is neither text, nor image, nor video.
    """
    converted = []
    for message in messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [_part(part) for part in content]
        converted.append(Message(cast("Role", message["role"]), tuple(parts)))
    return tuple(converted)


def question_of(text: str, visuals: Sequence[Any] | None) -> Conversation:
    """A prompt with its images or videos: at its placeholders if their numbers match, else first.

    Raises:
        DataError: as in `conversation_of`.
    """
    shown = [_visual(visual) for visual in visuals or ()]
    pieces = text.split(PLACEHOLDER)
    if shown and len(pieces) == len(shown) + 1:
        mixed = [part for pair in zip(pieces, [*shown, ""], strict=True) for part in pair]
        return user(*(part for part in mixed if part != ""))
    return user(*shown, text)


def _part(part: Mapping[str, Any]) -> Part:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image", "url": image}:
            return _visual(image)
        case {"type": "video", "url": str() | Path() as video}:
            return Video(video)
    raise DataError(
        f"lmms-eval asks with {part.get('type')!r} ({str(part)[:80]}); the model takes text, "
        "images and whole video files"
    )


def _visual(visual: Any) -> Part:
    if isinstance(visual, PIL.Image.Image):
        return Image(visual)
    if isinstance(visual, str | Path):
        images = PIL.Image.registered_extensions()
        return Image(visual) if Path(visual).suffix.lower() in images else Video(visual)
    raise DataError(
        f"lmms-eval shows a {type(visual).__name__}; the model takes PIL images and files"
    )
