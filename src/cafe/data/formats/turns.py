"""Conversations as files contain them: turns, with markers for the positions of images.

Turns are `from`/`value` or `role`/`content`; roles are human or user, gpt or assistant, system
(first), and those of tools (`cafe.data.formats.tools`). Each `<image>` in a human text is the
position of the next image; in an answer it is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cafe.data.formats.tools import CALLS, RESULTS, read_calls
from cafe.data.media_paths import MediaResolver
from cafe.data.records import kind
from cafe.errors import DataError, check_unicode, quoted
from cafe.types import Audio, Conversation, Image, Media, Message, Part, Role, ToolCall, Video


@dataclass(frozen=True, slots=True)
class Slot:
    """The position of the next image, video or recording of the record."""

    kind: Literal["image", "video", "audio"]


Piece = Part | Slot


# The newline between a marker and the text belongs to the format: templates add their own.
def _markers(*kinds: str) -> re.Pattern[str]:
    return re.compile(rf"(?:\r?\n)?<(?P<kind>{'|'.join(kinds)})>(?:\r?\n)?")


_ROLES: dict[object, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    **dict.fromkeys(CALLS, "assistant"),
    **dict.fromkeys(RESULTS, "tool"),
}
_EMPTY = {"user": "question", "assistant": "answer", "system": "system text", "tool": "result"}


@dataclass(frozen=True, slots=True)
class ListedMedia:
    """The images, videos and recordings that a record lists apart from its turns."""

    images: tuple[Image, ...] = ()
    videos: tuple[Video, ...] = ()
    recordings: tuple[Audio, ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn.

    role      who speaks
    named     the role's name in the file
    pieces    texts, images and slots for images, in reading order
    written   the pieces with the newlines around markers and all spaces; None: not from one text
    calls     of tools
    """

    role: Role
    named: str
    pieces: tuple[Piece, ...]
    written: tuple[Piece, ...] | None = None
    calls: tuple[ToolCall, ...] = ()


# ---------------------------------------------------------------------- turns -> conversation


def read_conversation(
    value: Any,
    shown: ListedMedia,
    media: MediaResolver,
    *,
    field: str,
    parts: bool = False,
    answers_show: bool = False,
) -> Conversation:
    """A conversation from a list of turns, with each marker replaced by the next image.

    Args:
        value: The list, as read from the file.
        shown: The images, videos and recordings that the markers stand for.
        media: Resolves images in typed parts.
        field: The name of the list in the record, for messages.
        parts: `content` may also be a list of typed parts (OpenAI).
        answers_show: An answer may contain an image.

    Returns:
        The conversation. One image without a marker is put in front of the first question.

    Raises:
        DataError: A turn is malformed, a text is empty, or the markers do not match the images.
    """
    if not isinstance(value, list) or not value:
        actual = "nothing" if value is None else kind(value)
        raise DataError(f"{field!r} must be a list of turns, found {actual}")
    # A text may mention the HTML tag <video>; where the record has no video, it is text.
    others = (("video", shown.videos), ("audio", shown.recordings))
    marker = _markers("image", *(name for name, listed in others if listed))
    markers: dict[Role, re.Pattern[str] | None] = {
        "user": marker,
        "assistant": marker if answers_show else None,
        "system": None,
        "tool": None,
    }
    turns = [
        _turn(turn, f"turn {number}", media, markers, parts) for number, turn in enumerate(value, 1)
    ]
    for number, turn in enumerate(turns, 1):
        if markers[turn.role] is None and any(not isinstance(piece, str) for piece in turn.pieces):
            raise DataError(
                f"turn {number}: an image in a {turn.named} turn; only human turns contain images"
            )
    return _filled(turns, shown)


def _turn(
    turn: Any,
    location: str,
    media: MediaResolver,
    markers: Mapping[Role, re.Pattern[str] | None],
    parts: bool,
) -> Turn:
    if not isinstance(turn, dict):
        raise DataError(f"{location}: expected an object, found {kind(turn)}")
    for role_key, text_key in (("from", "value"), ("role", "content")):
        if role_key in turn and (text_key in turn or turn.get("tool_calls")):
            break
    else:
        raise DataError(f"{location}: has neither 'from' and 'value' nor 'role' and 'content'")
    named, content = turn[role_key], turn.get(text_key)
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise DataError(f"{location}: {role_key} is {quoted(named)}, expected human or gpt")
    written, calls = None, ()
    if named in CALLS or turn.get("tool_calls"):
        calls = read_calls(content if named in CALLS else turn["tool_calls"], location)
        content = [] if named in CALLS or not content else content
    if calls and role != "assistant":
        raise DataError(f"{location}: {role_key} is {quoted(named)}, and only gpt calls tools")
    if role == "tool" and isinstance(content, str) and "<tool_response>" in content:
        raise DataError(f"{location}: contains <tool_response>, which the chat template writes")
    if isinstance(content, str):
        written = tuple(_split(_unicode(content, location), markers[role], bare=True))
        pieces = tuple(_split(content, markers[role]))
    elif isinstance(content, list) and (parts or calls):
        pieces = tuple(_part(part, location, media) for part in content)
    else:
        raise DataError(f"{location}: {text_key} is {kind(content)}, expected text")
    if role != "system":
        pieces = tuple(piece for piece in pieces if not isinstance(piece, str) or piece.strip())
    if role == "assistant" and len(pieces) == 1 and isinstance(pieces[0], str):
        pieces = (pieces[0].strip(),)
    if not calls and not any(not isinstance(piece, str) or piece.strip() for piece in pieces):
        raise DataError(
            f"{location}: the {_EMPTY[role]} is empty; write it, or leave the record out"
        )
    return Turn(role, str(named), pieces, written, calls)


def _split(text: str, marker: re.Pattern[str] | None, bare: bool = False) -> Iterator[Piece]:
    """Texts and markers in order.

    Args:
        text: Of one turn.
        marker: None: a turn that shows no images, in which "<image>" is text.
        bare: The newlines around a marker belong to the texts.
    """
    begin = 0
    for match in () if marker is None else marker.finditer(text):
        first, last = (match.start("kind") - 1, match.end("kind") + 1) if bare else match.span()
        yield text[begin:first]
        yield Slot(match["kind"])  # type: ignore[arg-type]
        begin = last
    yield text[begin:]


def _unicode(text: str, location: str) -> str:
    try:
        check_unicode(text)
    except DataError as error:
        raise DataError(f"{location}: {error}") from error
    return text


def _part(part: Any, location: str, media: MediaResolver) -> Piece:
    """One typed part. An image without a source is the next one in the record's list."""
    if isinstance(part, str):
        return _unicode(part, location)
    named = part.get("type") if isinstance(part, dict) else None
    match named:
        case "text":
            if not isinstance(part.get("text"), str):
                raise DataError(f"{location}: a text part contains {kind(part.get('text'))}")
            return _unicode(part["text"], location)
        case "image" | "image_url":
            value = next((part[k] for k in ("image", "image_url", "url", "path") if part.get(k)), 0)
            return media.image(value, named) if value else Slot("image")
        case "video" | "video_url":
            value = next((part[k] for k in ("video", "video_url", "url", "path") if part.get(k)), 0)
            return media.video(value, named) if value else Slot("video")
        case "audio" | "input_audio" | "audio_url":
            names = ("audio", "input_audio", "audio_url", "url", "path")
            value = next((part[k] for k in names if part.get(k)), 0)
            return media.recording(value, named) if value else Slot("audio")
    actual = kind(part) if named is None else f"type {quoted(named)}"
    raise DataError(
        f"{location}: a part is {actual}, expected type text, image, image_url, video or audio"
    )


def _filled(turns: Sequence[Turn], shown: ListedMedia) -> Conversation:
    pieces = [piece for turn in turns for piece in turn.pieces]
    listed: dict[str, tuple[Media, ...]] = {
        "image": shown.images,
        "video": shown.videos,
        "audio": shown.recordings,
    }
    if shown.videos and not shown.images and Slot("video") not in pieces:
        listed |= {"image": shown.videos, "video": ()}  # LLaVA-NeXT writes <image> for a video
    in_front: list[Part] = []
    for name, plural in (("image", "images"), ("video", "videos"), ("audio", "recordings")):
        markers, media = pieces.count(Slot(name)), listed[name]  # type: ignore[arg-type]
        written = any(not isinstance(piece, str | Slot) for piece in pieces)
        if markers == 0 and len(media) == 1 and not written:
            in_front.extend(media)
        elif markers != len(media):
            as_text = any(isinstance(piece, str) and f"<{name}>" in piece for piece in pieces)
            hint = f" (<{name}> in a gpt turn is text; only mode: pair reads it as a marker)"
            raise DataError(
                f"number of <{name}> markers is {markers}, number of {plural} is {len(media)}; "
                f"they must be equal{hint if as_text else ''}"
            )
    coming = {name: iter(media) for name, media in listed.items()}
    messages: list[Message] = []
    for turn in turns:
        content: list[Part] = [
            next(coming[piece.kind]) if isinstance(piece, Slot) else piece for piece in turn.pieces
        ]
        written = _written(turn, content)
        if turn.role == "user" and in_front:  # for the first question
            if turn.written is not None and written is None:
                written = tuple(content)  # the file places no image in it
            content, in_front = [*in_front, *content], []
        messages.append(Message(turn.role, tuple(content), written, turn.calls))
    return tuple(messages)


def _written(turn: Turn, content: Sequence[Part]) -> tuple[Part, ...] | None:
    """The turn as in the file, with the images of `content`; None where it is no different."""
    if turn.written is None or (turn.written == turn.pieces and Slot("image") not in turn.pieces):
        return None
    shown = (part for part in content if not isinstance(part, str))
    filled = (next(shown) if isinstance(piece, Slot) else piece for piece in turn.written)
    return tuple(part for part in filled if part != "")
