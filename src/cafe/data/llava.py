r"""LLaVA conversations, a JSON list or JSONL, become examples.

One record, from LLaVA's own pretraining data:

    {"id": "004539375", "image": "00453/004539375.jpg", "conversations": [
        {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
        {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam mattress topper"}
    ]}

`image` is a path, a list of paths (also named `images`), or absent. Each `<image>` in the human
text is where a picture stands. Turns are `from`/`value` or `role`/`content`; roles are human or
user, gpt or assistant, and system (first). Format: https://github.com/haotian-liu/LLaVA,
docs/Finetune_Custom_Data.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from cafe.data.quarantine import Rejected
from cafe.errors import DataError
from cafe.types import Conversation, Example, Image, Message, Part, Role, user

Mode = Literal["caption", "chat"]
Turns = Literal["conversation", "branches"]

LINES = {".jsonl", ".ndjson"}
"""File names that end so hold one record per line; all others hold one JSON list."""

_MARKER = "<image>"
# The newline between a marker and the text is the format's, not the text's: templates add theirs.
_MARKER_AND_NEWLINES = re.compile(r"(?:\r?\n)?<image>(?:\r?\n)?")
_ROLES: dict[object, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class Records:
    """What a file holds: every record is one example, or rejected with a reason."""

    examples: list[Example]
    rejected: list[Rejected]

    def __len__(self) -> int:
        return len(self.examples) + len(self.rejected)


def read_llava(
    path: Path,
    *,
    mode: Mode,
    turns: Turns = "conversation",
    image_root: Path | None = None,
    limit: int | None = None,
) -> Records:
    """Read a file of LLaVA conversations. Pictures are referenced, not opened.

    mode        caption: the picture is the query, all answers together the target, and the
                conversation the dialogue (CAFe, arXiv 2503.19900). chat: dialogues only.
    turns       conversation: one dialogue per record. branches: one per question, with the
                pictures in front of each
    image_root  where picture paths start, and the folder that none may leave (symbolic links
                followed); None: the folder of `path`
    limit       read the first so many records only

    A record that cannot be used is rejected: not JSON, fields missing, an answer empty, turns that
    do not alternate, markers that do not match the pictures (one picture without a marker is put
    in front), a picture missing or outside `image_root`.
    Raises DataError when the file or `image_root` cannot be read, or is no such file.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; name a JSON or JSONL file of LLaVA conversations")
    pictures = _Pictures(path.parent if image_root is None else image_root)
    records = Records([], [])
    for number, place, raw in islice(_raw_records(path), limit):
        name = place
        try:
            record = _record(raw)
            identity = record.get("id")
            if isinstance(identity, str | int):
                name = f"{place}, id {identity!r}"
            else:
                identity = f"{path.stem}-{number}"
            records.examples.append(_example(str(identity), record, pictures, mode, turns))
        except DataError as error:
            records.rejected.append(Rejected(str(path), name, str(error)))
    return records


# ---------------------------------------------------------------------- the file


def _raw_records(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Number, place and content of each record, from 1; of JSONL the line's bytes."""
    try:
        if path.suffix.lower() in LINES:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, f"line {number}", line
        else:
            for number, record in enumerate(_whole_list(path), 1):
                yield number, f"record {number}", record
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _whole_list(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        mend = "; a file of one record per line is named .jsonl" if "Extra" in error.msg else ""
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}){mend}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of records, found {_kind(content)}")
    return content


def _record(raw: Any) -> dict[str, Any]:
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise DataError(f"expected an object with 'conversations', found {_kind(raw)}")
    return raw


# ---------------------------------------------------------------------- pictures


class _Pictures:
    """Finds pictures below one folder; a path that comes again is the same `Image`."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._known: dict[str, Image] = {}
        self._folders: dict[Path, Path] = {}
        if not self._root.is_dir():
            raise DataError(f"image_root {str(root)!r}: no such folder")

    def of(self, record: dict[str, Any]) -> tuple[Image, ...]:
        if record.get("video") is not None or record.get("videos") is not None:
            raise DataError("it is about a video; only pictures are read")
        named = record.get("image", record.get("images"))
        names = named if isinstance(named, list) else [] if named is None else [named]
        return tuple(self._find(name) for name in names)

    def _find(self, name: object) -> Image:
        if not isinstance(name, str):
            raise DataError(f"'image' holds {_kind(name)}, expected a path")
        if name not in self._known:
            self._known[name] = Image(self._path(name))
        return self._known[name]

    def _path(self, name: str) -> Path:
        try:
            path = self._resolved(self._root / name)
            inside, exists = path.is_relative_to(self._root), path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, a link loop
            raise DataError(f"picture {name!r}: not a path ({error})") from error
        if not inside:
            raise DataError(
                f"picture {name!r} is outside {self._root}; move it there, or set image_root to a "
                "folder that holds all pictures"
            )
        if not exists:
            raise DataError(f"picture {name!r}: no such file in {self._root}")
        return path

    def _resolved(self, path: Path) -> Path:
        """`path.resolve()`, which walks all folders, with one walk per folder."""
        if path.parent not in self._folders:
            self._folders[path.parent] = path.parent.resolve()
        path = self._folders[path.parent] / path.name
        return path.resolve() if path.is_symlink() else path


# ---------------------------------------------------------------------- one record


def _example(
    identity: str, record: dict[str, Any], pictures: _Pictures, mode: Mode, turns: Turns
) -> Example:
    shown = pictures.of(record)
    conversation = _placed(_turns(record), shown)
    dialogues = _branches(conversation, shown) if turns == "branches" else (conversation,)
    if mode == "chat":
        return Example(identity, dialogues=dialogues)
    if not shown:
        raise DataError("it has no picture, and a caption needs one; read it with mode: chat")
    text = " ".join(m.text for m in conversation if m.role == "assistant")
    return Example(
        identity, query=user(*shown), target=user(text), dialogues=dialogues, target_id=text
    )


def _turns(record: dict[str, Any]) -> list[tuple[Role, str]]:
    """Role and text of each turn: an optional system turn, then user and assistant in turn."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        found = _kind(turns) if "conversations" in record else "nothing"
        raise DataError(f"'conversations' must be a list of turns, found {found}")
    checked = [_turn(turn, f"turn {number}") for number, turn in enumerate(turns, 1)]
    roles = [role for role, _ in checked]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise DataError(
            f"turns must be human, gpt, human, gpt, ... up to an answer, found {', '.join(roles)}"
        )
    return checked


def _turn(turn: Any, place: str) -> tuple[Role, str]:
    if not isinstance(turn, dict):
        raise DataError(f"{place}: expected an object, found {_kind(turn)}")
    for role_key, text_key in (("from", "value"), ("role", "content")):
        if role_key in turn and text_key in turn:
            break
    else:
        raise DataError(f"{place}: has neither 'from' and 'value' nor 'role' and 'content'")
    named, text = turn[role_key], turn[text_key]
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise DataError(f"{place}: {role_key} is {named!r}, expected human or gpt")
    if not isinstance(text, str):
        raise DataError(f"{place}: {text_key} is {_kind(text)}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair
        raise DataError(f"{place}: the text is not Unicode ({error.reason})") from error
    if role != "user" and _MARKER in text:
        raise DataError(f"{place}: {_MARKER} stands in a {named} turn; only human turns show one")
    if not text.strip():
        what = {"user": "question", "assistant": "answer", "system": "system text"}[role]
        raise DataError(f"{place}: the {what} is empty")
    return role, text.strip() if role == "assistant" else text


def _placed(turns: Sequence[tuple[Role, str]], pictures: Sequence[Image]) -> Conversation:
    """The turns with each marker replaced by the next picture."""
    markers = sum(text.count(_MARKER) for _, text in turns)
    in_front = markers == 0 and len(pictures) == 1
    if markers != len(pictures) and not in_front:
        raise DataError(
            f"number of {_MARKER} markers is {markers}, number of pictures is {len(pictures)}; "
            "they must be equal"
        )
    coming = iter(pictures)
    messages: list[Message] = []
    for role, text in turns:
        content: list[Part] = []
        if role == "user":
            if in_front:
                content.extend(coming)  # the first user turn takes it
            first, *others = _MARKER_AND_NEWLINES.split(text)
            content.append(first)
            for piece in others:
                content += [next(coming), piece]
            content = [part for part in content if isinstance(part, Image) or str(part).strip()]
        else:
            content.append(text)
        messages.append(Message(role, tuple(content)))
    return tuple(messages)


def _branches(conversation: Conversation, pictures: Sequence[Image]) -> tuple[Conversation, ...]:
    """Each question with its answer as a dialogue of its own, all pictures in front of it."""
    system = tuple(m for m in conversation if m.role == "system")
    spoken = conversation[len(system) :]
    return tuple(
        (*system, Message("user", (*pictures, *_texts(question))), answer)
        for question, answer in zip(spoken[::2], spoken[1::2], strict=True)
    )


def _texts(message: Message) -> tuple[str, ...]:
    return tuple(part for part in message.content if isinstance(part, str))


def _kind(value: object) -> str:
    """How JSON calls it."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list" if value else "an empty list"
        case _:
            return "an object"
