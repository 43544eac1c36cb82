"""The types that all packages share: messages, examples, hits, scores.

Nothing here computes. All data formats are read into these few frozen dataclasses, and only the
collator (`cafe.model.rows.collate`) knows how they become tokens. No torch, no transformers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

Role = Literal["system", "user", "assistant", "tool", "tools"]
"""tool: what a call returned. tools: which tools there are, as JSON; in front of a conversation."""


class StoredFile(ABC):
    """A media file inside a container such as an archive or a table. It can be pickled.

    name   identifies it, among other files and in errors
    """

    __slots__ = ()

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def read(self) -> bytes:
        """The content of the file. Raises DataError when it no longer exists."""

    @property
    def fingerprint(self) -> bytes | None:
        """What tells its content apart from others' without reading it; None: only reading does."""
        return None

    def text(self) -> str | None:
        """The text that the container stores for the image, as a PDF does for a page; None: none.

        Raises:
            ImageError: It cannot be read.
        """
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """An image by reference; decoded late, by `cafe.media.open_image`.

    `source` is a path, the encoded bytes of an image file, an image stored inside a container, or a
    decoded PIL image. An image of more than `pixel_budget` pixels (width x height) is downscaled
    when it is opened.
    Two `Image` objects are the same image when they are the same object or share `key`.
    `digest`, where there is one, names what is seen (content and pixel budget).
    """

    source: str | Path | bytes | PIL.Image.Image | StoredFile
    pixel_budget: int | None = None
    digest: str | None = None

    @property
    def key(self) -> object:
        """Identity of the image when prefixes are merged: its digest if it has one, else path and
        pixel budget, or the object.
        """
        if self.digest is not None:
            return ("digest", self.digest)
        match self.source:
            case str() | Path():
                name: object = str(self.source)
            case StoredFile():
                name = self.source.name
            case _:
                name = id(self.source)
        return name if self.pixel_budget is None else (name, self.pixel_budget)


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """A video by reference: a path, or its frames in order (PIL images, or paths of images).

    A frame of more than `pixel_budget` pixels is downscaled, as an image is.
    """

    source: str | Path | tuple[PIL.Image.Image | Path, ...]
    pixel_budget: int | None = None

    @property
    def key(self) -> object:
        match self.source:
            case str() | Path():
                name: object = str(self.source)
            case (Path(), *_):
                name = tuple(map(str, self.source))
            case _:
                name = id(self.source)
        return name if self.pixel_budget is None else (name, self.pixel_budget)


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """A recording by reference; decoded late, by `cafe.audio.open_audio`.

    `source` is a path, the encoded bytes of an audio file, a file stored inside a container, or
    samples with their `rate` in Hz: [samples] or [channels, samples], in -1 … 1 or integers.
    Of a recording of more than `max_seconds` only the beginning is heard; None: all of it, and one
    that is longer than a model hears is an error.
    """

    source: str | Path | bytes | StoredFile | np.ndarray
    rate: int | None = None
    max_seconds: float | None = None

    @property
    def key(self) -> object:
        match self.source:
            case str() | Path():
                name: object = str(self.source)
            case StoredFile():
                name = self.source.name
            case _:
                name = id(self.source)
        return name if self.max_seconds is None else (name, self.max_seconds)


Media = Image | Video | Audio
Part = str | Media


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool by an assistant; `arguments` is a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `content` holds text, images, videos and audio in reading order.

    written   the same with every space and newline of the file, and without images that the file
              does not place; None: no different. Only `cafe.model.rows.official` reads it
    calls     the tools that an assistant calls after its text
    """

    role: Role
    content: tuple[Part, ...]
    written: tuple[Part, ...] | None = field(default=None, compare=False, repr=False)
    calls: tuple[ToolCall, ...] = ()

    @property
    def text(self) -> str:
        return "".join(part for part in self.content if isinstance(part, str))


Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: a contrastive pair, dialogues to answer, or both.

    query, target   the two sides of a contrastive pair; each is embedded (paper §1.3)
    negatives       explicit hard negatives of this query
    query_thought, target_thought   that side, and what the model says of it before it is embedded
                    (think-then-embed): a conversation that ends with an assistant turn; None: no
    scores          a teacher's, of the target and then of each negative, for this query; None: no
    dialogues       conversations whose assistant turns carry the language loss; several
                    dialogues about one image are branches of one row
    target_id       examples with equal target ids are not negatives of one another; nor are those
                    with the same query or the same target, whatever their ids
    task            all examples of a batch have the same task
    embedding_prompt  name of the prompt that asks for an embedding (`cafe.model.rows.prompts`)
    """

    id: str
    query: Conversation | None = None
    target: Conversation | None = None
    negatives: tuple[Conversation, ...] = ()
    dialogues: tuple[Conversation, ...] = ()
    target_id: str | None = None
    task: str = "default"
    embedding_prompt: str = "compress"
    query_thought: Conversation | None = None
    target_thought: Conversation | None = None
    scores: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if (self.query is None) != (self.target is None):
            raise ValueError(f"example {self.id!r}: query and target come together or not at all")
        if self.negatives and self.query is None:
            raise ValueError(f"example {self.id!r}: negatives need a query")
        if (self.query_thought or self.target_thought) and self.query is None:
            raise ValueError(f"example {self.id!r}: a thought needs a pair")
        if self.scores is not None and len(self.scores) != 1 + len(self.negatives):
            raise ValueError(f"example {self.id!r}: one score for the target, one per negative")
        if self.query is None and not self.dialogues:
            raise ValueError(f"example {self.id!r}: neither a contrastive pair nor a dialogue")

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        """All that it holds: both sides, negatives, dialogues, and thoughts."""
        sides = tuple(side for side in (self.query, self.target) if side is not None)
        possible = (self.query_thought, self.target_thought)
        thoughts = tuple(thought for thought in possible if thought is not None)
        return (*sides, *self.negatives, *self.dialogues, *thoughts)


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result with its cosine similarity."""

    id: str
    score: float
    metadata: dict[str, Any] = field(default_factory=dict)


Scores = dict[str, float]

CAPTION_REQUEST = "Describe this image."
"""What asks for a caption where a data set has no words of its own, in training and in `encode`."""

AUDIO_CAPTION_REQUEST = "Describe this sound."
"""The same for a recording, in training."""

MATCH_QUESTION = 'Does the picture show "{statement}"? Answer yes or no.'
"""What `CAFe.score` asks. The bundled world trains this question, including near misses."""

PAIR_QUESTION = (
    "Query:\n",
    "\nDocument:\n",
    "\nDoes the document match the query? Answer yes or no.",
)
"""What `CAFe.score` asks of two sides that are not an image and a text: the words before the query,
between the two, and after the document. Nothing here trains it."""


def user(*content: Part) -> Conversation:
    """A conversation of one user turn."""
    return (Message("user", content),)


def thought_about(side: Conversation, thought: str) -> Conversation:
    """What is embedded after a thought: the input, a request for a description, and the thought."""
    *before, last = side
    asked = Message("user", (*last.content, CAPTION_REQUEST))
    return (*before, asked, Message("assistant", (thought.strip(),)))


def joined_turns(conversation: Conversation) -> Conversation:
    """The conversation with neighbouring turns of one role as one, their texts on lines apart.

    What several tools returned stays apart.
    """
    turns: list[Message] = []
    for message in conversation:
        if turns and turns[-1].role == message.role != "tool":
            before = turns[-1]
            written = None
            if before.written is not None or message.written is not None:
                written = _on_lines(
                    before.written or before.content, message.written or message.content
                )
            content = _on_lines(before.content, message.content)
            turns[-1] = Message(message.role, content, written, before.calls + message.calls)
        else:
            turns.append(message)
    return tuple(turns)


def _on_lines(first: tuple[Part, ...], second: tuple[Part, ...]) -> tuple[Part, ...]:
    """The parts of both, with a newline where text meets text."""
    match (first, second):
        case ((*before, str(end)), (str(begin), *after)):
            return (*before, f"{end}\n{begin}", *after)
    return (*first, *second)


def content_key(value: Part | Conversation) -> Hashable:
    """What tells inputs apart: text, the image's path or identity, or what stands around them.

    A user's message of one part is that part.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Audio):
        return ("audio", value.key)
    if isinstance(value, Image | Video):
        return ("image", value.key)
    match value:
        case (message,) if message.role == "user" and len(message.content) == 1:
            return content_key(message.content[0])
    return tuple((m.role, tuple(content_key(part) for part in m.content)) for m in value)
