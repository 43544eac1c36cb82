"""What a format is: a name, the columns it is known by, and a function from record to examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cafe.data.pictures import Media
from cafe.data.records import Meaning, Mode, Record
from cafe.types import Example


@dataclass(frozen=True, slots=True)
class Format:
    """One layout of records.

    name      as a recipe calls it
    layout    its columns, for messages
    columns   the names that it reads; a column map may give them
    fits      whether records with these columns are of this format
    modes     in which it can be read; the first is the default
    pair_prompt  the embedding prompt in pair mode: "none" where records bring instructions
    read      id, record, where pictures are, meaning -> its examples (more than one when the record
              has several positives). Raises DataError for a record that cannot be used
    """

    name: str
    layout: str
    columns: frozenset[str]
    fits: Callable[[frozenset[str]], bool]
    modes: tuple[Mode, ...]
    pair_prompt: str
    read: Callable[[str, Record, Media, Meaning], tuple[Example, ...]]
