"""Conversations as files write them: turns, markers where pictures stand, and the three modes.

Turns are `from`/`value` or `role`/`content`; roles are human or user, gpt or assistant, and system
(first). Each `<image>` in a human text is where the next picture stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cafe.data.pictures import Media
from cafe.data.records import Meaning, kind
from cafe.errors import DataError
from cafe.types import Conversation, Example, Image, Message, Part, Role, Video, user


@dataclass(frozen=True, slots=True)
class Slot:
    """Where the next picture or video of the record stands."""

    kind: Literal["image", "video"]


Piece = str | Image | Video | Slot

# The newline between a marker and the text is the format's, not the text's: templates add theirs.
_MARKER = re.compile(r"(?:\r?\n)?<(image|video)>(?:\r?\n)?")
_IMAGE_MARKER = re.compile(r"(?:\r?\n)?<(image)>(?:\r?\n)?")
_ROLES: dict[object, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_EMPTY: dict[Role, str] = {"user": "question", "assistant": "answer", "system": "system text"}


@dataclass(frozen=True, slots=True)
class Shown:
    """The pictures and videos that a record lists beside its turns."""

    images: tuple[Image, ...] = ()
    videos: tuple[Video, ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn; `named` is what the file calls the role."""

    role: Role
    named: str
    pieces: tuple[Piece, ...]


# ---------------------------------------------------------------------- turns -> conversation


def read_conversation(
    value: Any,
    shown: Shown,
    media: Media,
    *,
    field: str,
    parts: bool = False,
    answers_show: bool = False,
) -> Conversation:
    """A list of turns, with each marker replaced by the next picture.

    field         where it stands in the record, for messages
    parts         `content` may also be a list of typed parts (OpenAI)
    answers_show  an answer may hold a picture
    Raises DataError when turns are not what they should be, a text is empty, or the markers do not
    match the pictures (one picture without a marker is put in front of the first question).
    """
    if not isinstance(value, list) or not value:
        found = "nothing" if value is None else kind(value)
        raise DataError(f"{field!r} must be a list of turns, found {found}")
    # Somebody may write of the HTML tag; where the record has no video, it is text.
    marker = _MARKER if shown.videos else _IMAGE_MARKER
    turns = [
        _turn(turn, f"turn {number}", media, marker, parts) for number, turn in enumerate(value, 1)
    ]
    for number, turn in enumerate(turns, 1):
        silent = turn.role == "system" or (turn.role == "assistant" and not answers_show)
        if silent and any(not isinstance(piece, str) for piece in turn.pieces):
            raise DataError(
                f"turn {number}: <image> stands in a {turn.named} turn; only human turns show one"
            )
    return _filled(turns, shown)


def check_alternation(conversation: Conversation) -> None:
    """An optional system turn, then question and answer in turn. Raises DataError."""
    roles = [message.role for message in conversation]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise DataError(
            f"turns must be human, gpt, human, gpt, ... up to an answer, found {', '.join(roles)}"
        )


def _turn(turn: Any, place: str, media: Media, marker: re.Pattern[str], parts: bool) -> Turn:
    if not isinstance(turn, dict):
        raise DataError(f"{place}: expected an object, found {kind(turn)}")
    for role_key, text_key in (("from", "value"), ("role", "content")):
        if role_key in turn and text_key in turn:
            break
    else:
        raise DataError(f"{place}: has neither 'from' and 'value' nor 'role' and 'content'")
    named, content = turn[role_key], turn[text_key]
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise DataError(f"{place}: {role_key} is {named!r}, expected human or gpt")
    if isinstance(content, str):
        pieces = tuple(_split(_unicode(content, place), marker))
    elif isinstance(content, list) and parts:
        pieces = tuple(_part(part, place, media) for part in content)
    else:
        raise DataError(f"{place}: {text_key} is {kind(content)}, expected text")
    if role != "system":
        pieces = tuple(piece for piece in pieces if not isinstance(piece, str) or piece.strip())
    if role == "assistant" and len(pieces) == 1 and isinstance(pieces[0], str):
        pieces = (pieces[0].strip(),)
    if not any(not isinstance(piece, str) or piece.strip() for piece in pieces):
        raise DataError(f"{place}: the {_EMPTY[role]} is empty; write it, or leave the record out")
    return Turn(role, str(named), pieces)


def _split(text: str, marker: re.Pattern[str]) -> Iterator[Piece]:
    begin = 0
    for found in marker.finditer(text):
        yield text[begin : found.start()]
        yield Slot("image" if found[1] == "image" else "video")
        begin = found.end()
    yield text[begin:]


def _unicode(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair
        raise DataError(f"{place}: the text is not Unicode ({error.reason})") from error
    return text


def _part(part: Any, place: str, media: Media) -> Piece:
    """One typed part. A picture without a source is the next one that the record lists."""
    if isinstance(part, str):
        return _unicode(part, place)
    named = part.get("type") if isinstance(part, dict) else None
    match named:
        case "text":
            if not isinstance(part.get("text"), str):
                raise DataError(f"{place}: a text part holds {kind(part.get('text'))}")
            return _unicode(part["text"], place)
        case "image" | "image_url":
            value = next((part[k] for k in ("image", "image_url", "url", "path") if part.get(k)), 0)
            return media.image(value, named) if value else Slot("image")
        case "video" | "video_url":
            value = next((part[k] for k in ("video", "video_url", "url", "path") if part.get(k)), 0)
            return media.video(value, named) if value else Slot("video")
    found = kind(part) if named is None else f"type {named!r}"
    raise DataError(f"{place}: a part is {found}, expected type text, image, image_url or video")


def _filled(turns: Sequence[Turn], shown: Shown) -> Conversation:
    pieces = [piece for turn in turns for piece in turn.pieces]
    listed: dict[str, tuple[Image | Video, ...]] = {"image": shown.images, "video": shown.videos}
    if shown.videos and not shown.images and Slot("video") not in pieces:
        listed = {"image": shown.videos, "video": ()}  # LLaVA-NeXT writes <image> for a video
    in_front: list[Part] = []
    for name, plural in (("image", "pictures"), ("video", "videos")):
        markers, given = pieces.count(Slot(name)), listed[name]  # type: ignore[arg-type]
        written = any(isinstance(piece, Image | Video) for piece in pieces)
        if markers == 0 and len(given) == 1 and not written:
            in_front.extend(given)
        elif markers != len(given):
            raise DataError(
                f"number of <{name}> markers is {markers}, number of {plural} is {len(given)}; "
                "they must be equal"
            )
    coming = {name: iter(given) for name, given in listed.items()}
    messages: list[Message] = []
    for turn in turns:
        content: list[Part] = [
            next(coming[piece.kind]) if isinstance(piece, Slot) else piece for piece in turn.pieces
        ]
        if turn.role == "user" and in_front:  # the first question takes it
            content, in_front = [*in_front, *content], []
        messages.append(Message(turn.role, tuple(content)))
    return tuple(messages)


# ---------------------------------------------------------------------- conversation -> example


def conversation_example(identity: str, conversation: Conversation, meaning: Meaning) -> Example:
    """A conversation that ends with an answer, read in one of the three modes."""
    check_alternation(conversation)
    dialogues = _branches(conversation) if meaning.turns == "branches" else (conversation,)
    match meaning.mode:
        case "chat":
            return Example(identity, dialogues=dialogues, task=meaning.task)
        case "pair":
            return _pair(identity, conversation, meaning)
    shown = _shown(conversation)
    if not shown:
        raise DataError("it has no picture, and a caption needs one; read it with mode: chat")
    text = " ".join(m.text for m in conversation if m.role == "assistant")
    return Example(
        identity,
        query=user(*shown),
        target=user(text),
        dialogues=dialogues if meaning.language_loss else (),
        target_id=text,
        task=meaning.task,
        embedding_prompt=meaning.embedding_prompt,
    )


def _pair(identity: str, conversation: Conversation, meaning: Meaning) -> Example:
    """The question is the query and the answer the target, which may show a picture (MMEB)."""
    *question, answer = conversation
    if any(message.role == "assistant" for message in question):
        raise DataError("a pair is one question and one answer; read it with mode: caption")
    return pair_example(identity, tuple(question), user(*answer.content), meaning)


def pair_example(
    identity: str,
    query: Conversation,
    target: Conversation,
    meaning: Meaning,
    negatives: Sequence[Conversation] = (),
    target_id: str | None = None,
) -> Example:
    """Two sides of a pair. A target that is text only is also the answer to the query.

    target_id   None: equal targets are the same one
    """
    answer = Message("assistant", target[-1].content)
    spoken = len(target) == 1 and all(isinstance(part, str) for part in answer.content)
    answered = meaning.language_loss and spoken and query[-1].role == "user"
    return Example(
        identity,
        query=query,
        target=target,
        negatives=tuple(negatives),
        dialogues=((*query, answer),) if answered else (),
        target_id=target_id,
        task=meaning.task,
        embedding_prompt=meaning.embedding_prompt,
    )


def _shown(conversation: Conversation) -> tuple[Image | Video, ...]:
    parts = (part for message in conversation for part in message.content)
    return tuple(part for part in parts if not isinstance(part, str))


def _branches(conversation: Conversation) -> tuple[Conversation, ...]:
    """Each question with its answer as a dialogue of its own, all pictures in front of it."""
    shown = _shown(conversation)
    system = tuple(m for m in conversation if m.role == "system")
    spoken = conversation[len(system) :]
    return tuple(
        (*system, Message("user", (*shown, *_texts(question))), answer)
        for question, answer in zip(spoken[::2], spoken[1::2], strict=True)
    )


def _texts(message: Message) -> tuple[str, ...]:
    return tuple(part for part in message.content if isinstance(part, str))
