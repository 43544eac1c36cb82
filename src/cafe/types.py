"""The words every module speaks: messages, examples, hits, scores.

Nothing here computes. All data formats become these few frozen dataclasses, and only the
collator (`cafe.model.collate`) knows how they turn into tokens. No torch, no transformers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import PIL.Image

Role = Literal["system", "user", "assistant"]


class Stored(ABC):
    """A picture file inside something larger: an archive, a table. It can be sent to workers.

    name   names it in errors, and tells it from all others
    """

    __slots__ = ()

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def read(self) -> bytes:
        """The encoded picture. Raises ImageError when it is no longer there."""


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """A picture by reference; decoded late, by `cafe.media.open_image`.

    `source` is a path, the encoded bytes of a picture file, a picture stored inside something
    larger, or a decoded PIL image. A picture of more than `pixel_budget` pixels (width x height) is
    made smaller when it is opened.
    Two `Image` objects are the same picture when they are the same object or share `key`.
    """

    source: str | Path | bytes | PIL.Image.Image | Stored
    pixel_budget: int | None = None

    @property
    def key(self) -> object:
        """What tells pictures apart when branches are merged: path and size, or identity."""
        match self.source:
            case str() | Path():
                name: object = str(self.source)
            case Stored():
                name = self.source.name
            case _:
                name = id(self.source)
        return name if self.pixel_budget is None else (name, self.pixel_budget)


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """A video by reference: a path, or its frames in order (PIL images, or paths of pictures).

    A frame of more than `pixel_budget` pixels is made smaller, as a picture is.
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


Part = str | Image | Video


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `content` keeps text and pictures in reading order."""

    role: Role
    content: tuple[Part, ...]

    @property
    def text(self) -> str:
        return "".join(part for part in self.content if isinstance(part, str))


Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: what contrasts, what is answered, or both.

    query, target   the two sides of a contrastive pair; each is embedded (paper §1.3)
    negatives       explicit hard negatives of this query
    dialogues       conversations whose assistant turns carry the language loss; several
                    dialogues about one picture are branches of one row
    target_id       examples with equal target ids are no negatives of one another
    task            batches are homogeneous by task
    embedding_prompt  name of the prompt that asks for an embedding (`cafe.model.prompts`)
    """

    id: str
    query: Conversation | None = None
    target: Conversation | None = None
    negatives: tuple[Conversation, ...] = ()
    dialogues: tuple[Conversation, ...] = ()
    target_id: str | None = None
    task: str = "default"
    embedding_prompt: str = "compress"

    def __post_init__(self) -> None:
        if (self.query is None) != (self.target is None):
            raise ValueError(f"example {self.id!r}: query and target come together or not at all")
        if self.negatives and self.query is None:
            raise ValueError(f"example {self.id!r}: negatives need a query")
        if self.query is None and not self.dialogues:
            raise ValueError(f"example {self.id!r}: neither a contrastive pair nor a dialogue")


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result: what was found and how near it is (cosine)."""

    id: str
    score: float
    metadata: dict[str, Any] = field(default_factory=dict)


Scores = dict[str, float]


def user(*content: Part) -> Conversation:
    """A conversation of one user turn."""
    return (Message("user", content),)
