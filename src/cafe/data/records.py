"""What is read of a data set, and how its records become examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cafe.data.quarantine import Rejected
from cafe.types import Example

Mode = Literal["caption", "chat", "pair"]
Turns = Literal["conversation", "branches"]

Record = dict[str, Any]
"""One record of a file, its columns by name."""


@dataclass(frozen=True, slots=True)
class Records:
    """What a data set holds: every record is examples, or rejected with a reason.

    format   how the records were read (a name of `cafe.data.formats.FORMATS`)
    """

    examples: list[Example]
    rejected: list[Rejected]
    format: str

    def __len__(self) -> int:
        return len(self.examples) + len(self.rejected)


@dataclass(frozen=True, slots=True)
class Reading:
    """How a data set is read.

    format            a name of `cafe.data.formats.FORMATS`; auto: found by the columns
    mode              caption: the pictures are the query, all answers together the target, and the
                      conversation the dialogue (CAFe, arXiv 2503.19900). chat: dialogues only.
                      pair: two sides as the records give them. None: the format's first
    turns             conversation: one dialogue per record. branches: one per question, with the
                      pictures in front of each
    language_loss     False: no dialogues, the pairs only
    embedding_prompt  a name of `cafe.model.prompts.PROMPTS`; None: the format's own
    task              of all examples
    columns           names that formats know -> columns of this data set
    split             of a data set that has several
    image_root        where picture paths start, and the folder that none may leave (symbolic links
                      followed); None: the folder of the file
    pixel_budget      larger pictures are made smaller, to at most so many pixels
    limit             read the first so many records only
    """

    format: str = "auto"
    mode: Mode | None = None
    turns: Turns = "conversation"
    language_loss: bool = True
    embedding_prompt: str | None = None
    task: str = "default"
    columns: Mapping[str, str] | None = None
    split: str | None = None
    image_root: Path | None = None
    pixel_budget: int | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Meaning:
    """The part of `Reading` that decides what a record means, its defaults filled in."""

    mode: Mode
    turns: Turns
    language_loss: bool
    embedding_prompt: str
    task: str


def kind(value: object) -> str:
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
        case bytes():
            return "bytes"
        case list():
            return "a list" if value else "an empty list"
        case _:
            return "an object"
