"""Records: as they are stored, as options say to read them, and as the examples that they give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from cafe.data.quarantine import Skipped
from cafe.errors import DataError, first_line
from cafe.types import Example

Mode = Literal["caption", "chat", "pair"]
Turns = Literal["conversation", "branches"]

Record = dict[str, Any]
"""One record of a file, its columns by name."""


# ---------------------------------------------------------------------- as stored


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record as it is stored.

    location  where it is, for messages: "line 7"
    id        its name if the content has no `id`
    content   should be an object; a DataError where it cannot be read
    """

    location: str
    id: str
    content: Any


@dataclass(frozen=True, slots=True)
class Table:
    """A file or data set of records.

    name      for messages
    folder    where image paths start; None: there is no folder
    columns   names of the columns; None: records may differ
    rows      returns the records in order, starting from the first at each call
    """

    name: str
    folder: Path | None
    columns: frozenset[str] | None
    rows: Callable[[], Iterator[RawRecord]]


class NoSuchSplit(DataError):
    """A split is not there, or none was named of several. `splits`: those that are there."""

    def __init__(self, source: object, split: str | None, splits: Sequence[str]) -> None:
        problem = "set split" if split is None else f"split {split!r} is not there"
        super().__init__(f"{source}: {problem}; there are {', '.join(splits)}")
        self.splits = tuple(splits)


def cannot_be_read(path: object, error: Exception) -> DataError:
    """The DataError for a file that cannot be opened or decoded."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return DataError(f"{path}: cannot be read ({reason})")


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, each with its number, from 1.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # U+2028 may stand within a line
    except (OSError, UnicodeDecodeError) as error:
        raise cannot_be_read(path, error) from error
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def kind(value: object) -> str:
    """The name of a value's JSON type, for messages."""
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


# ---------------------------------------------------------------------- as read


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How a data set is read. The names are those of the keys of a recipe's data source.

    format            a name in `cafe.data.formats.FORMATS`; auto: detected from the columns
    mode              caption: the images are the query, all answers together the target, and the
                      conversation the dialogue (CAFe, arXiv 2503.19900). chat: dialogues only.
                      pair: two sides as the records have them. None: the format's default
    turns             conversation: one dialogue per record. branches: one per question, with the
                      images in front of each
    language_loss     False: pairs only, no dialogues
    embedding_prompt  a name in `cafe.model.rows.prompts.PROMPTS`; None: the format's default
    task              task of all examples
    scores            column of a teacher's scores of the positive and of each negative
    columns           column names that formats know -> columns of this data set
    split             split to read, where there are several
    image_root        where image paths start; none may leave this folder, but the links in it
                      are followed; None: the folder of the file
    max_pixels        larger images are downscaled to at most this number of pixels
    max_seconds       of longer recordings only this beginning is heard; None: all, and one that is
                      longer than the model hears is skipped
    limit             read only the first N records
    """

    format: str = "auto"
    mode: Mode | None = None
    turns: Turns = "conversation"
    language_loss: bool = True
    embedding_prompt: str | None = None
    task: str = "default"
    scores: str | None = None
    columns: Mapping[str, str] | None = None
    split: str | None = None
    image_root: Path | None = None
    max_pixels: int | None = None
    max_seconds: float | None = None
    limit: int | None = None

    @classmethod
    def of(cls, source: object) -> Self:
        """The options that `source` has as attributes, as a recipe's `DataSource` does."""
        return cls(**{key.name: getattr(source, key.name) for key in fields(cls)})

    @property
    def prompt(self) -> str:
        """The embedding prompt of examples; CAFe's where none is chosen."""
        return self.embedding_prompt or "compress"


@dataclass(frozen=True, slots=True)
class Records:
    """The content of a data set: every record gives examples, or is skipped with a reason.

    format   the format of the records (a name in `cafe.data.formats.FORMATS`)
    changes  what was changed in records so that they can be used -> in how many
    """

    examples: list[Example]
    skipped: list[Skipped]
    format: str
    changes: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.examples) + len(self.skipped)
