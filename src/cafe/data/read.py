"""Any data set -> examples: how it is stored, which format it has, what each record means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from cafe.data.formats import FORMATS, Format, check_columns, detect_format, renamed
from cafe.data.formats.mixture import chosen, is_mixture, read_mixture
from cafe.data.formats.mmeb import EVALUATION_COLUMNS, Ranked, RankedReader
from cafe.data.pictures import Media
from cafe.data.quarantine import Rejected
from cafe.data.records import Meaning, Reading, Record, Records, kind
from cafe.data.tables import Raw, Table, open_table
from cafe.errors import DataError
from cafe.types import Example

_LOOKED_AT = 100  # records that tell the format, where the storage knows no columns

T = TypeVar("T")


def detect(path: str | Path, how: Reading = Reading()) -> str:  # noqa: B008 - frozen
    """The name of the format of the records at `path`.

    Raises DataError, which lists the formats, when none fits or several do.
    """
    if is_mixture(Path(path)):
        return detect(read_mixture(Path(path))[0].path, how)
    return _format(open_table(path, split=how.split), how).name


def read_examples(
    path: str | Path,
    how: Reading = Reading(),  # noqa: B008 - frozen
    *,
    index: Path | None = None,
) -> Records:
    """Read a file, folder, mixture or hub data set. Pictures are referenced, not opened.

    index   a folder beside the run that keeps what was found in archives

    A record that cannot be used is rejected, with its place and the mend: not JSON, fields missing,
    an answer empty, turns that do not alternate, markers that do not match the pictures, a picture
    missing or outside of `how.image_root`.
    Raises DataError when the data set itself cannot be read, or its format is not clear.
    """
    if not is_mixture(Path(path)):
        table = open_table(path, split=how.split, index=index)
        return _read(table, islice(table.rows(), how.limit), how)
    parts: list[Records] = []
    left = how.limit
    for number, portion in enumerate(read_mixture(Path(path))):
        table = open_table(portion.path, split=how.split, index=index)
        raws = list(table.rows())
        wanted = chosen(portion.strategy, len(raws), seed=number)
        parts.append(_read(table, (raws[i] for i in islice(wanted, left)), how))
        left = None if left is None else left - min(left, len(wanted))
    return Records(
        examples=[example for part in parts for example in part.examples],
        rejected=[item for part in parts for item in part.rejected],
        format=", ".join(dict.fromkeys(part.format for part in parts)),
    )


def read_ranked(
    path: str | Path, *, image_root: Path | None = None, limit: int | None = None
) -> tuple[list[Ranked], list[Rejected]]:
    """Queries with their candidates, in MMEB-eval's layout, and the rows that cannot be used.

    Raises DataError when the file cannot be read or has other columns.
    """
    table = open_table(path, split="test")
    columns = table.columns or frozenset(_columns(table))
    if missing := sorted(EVALUATION_COLUMNS - columns):
        raise DataError(f"{path}: no table of MMEB-eval, it has no column {', '.join(missing)}")
    reader = RankedReader(Media(image_root or table.folder))
    return _each(table, islice(table.rows(), limit), lambda i, record: [reader.read(i, record)])


def _read(table: Table, raws: Iterable[Raw], how: Reading) -> Records:
    media = Media(how.image_root or table.folder, how.pixel_budget)
    format = _format(table, how)
    meaning = _meaning(format, how, table.name)
    mapping = how.columns or {}

    def read(identity: str, record: Record) -> Iterable[Example]:
        return format.read(identity, renamed(record, mapping), media, meaning)

    examples, rejected = _each(table, raws, read)
    return Records(examples, rejected, format.name)


def _each(
    table: Table, raws: Iterable[Raw], read: Callable[[str, Record], Iterable[T]]
) -> tuple[list[T], list[Rejected]]:
    """What `read` makes of every record, and those that it cannot use."""
    found: list[T] = []
    rejected: list[Rejected] = []
    for raw in raws:
        place, identity = raw.place, raw.id
        try:
            record = _record(raw.content)
            own = record.get("id")
            if isinstance(own, str | int) and str(own) != identity:
                place, identity = f"{place}, id {own!r}", str(own)
            found.extend(read(identity, record))
        except DataError as error:
            rejected.append(Rejected(table.name, place, str(error)))
    return found, rejected


def _record(content: Any) -> Record:
    if isinstance(content, DataError):
        raise content
    if not isinstance(content, dict):
        raise DataError(f"expected an object, found {kind(content)}")
    return content


# ---------------------------------------------------------------------- which format


def _format(table: Table, how: Reading) -> Format:
    """The format that was asked for, or the one that the columns fit."""
    try:
        mapping = how.columns or {}
        if mapping:
            check_columns(mapping, table.columns or _columns(table))
        if how.format != "auto":
            if how.format not in FORMATS:
                raise DataError(f"format {how.format!r}: use one of auto, {', '.join(FORMATS)}")
            return FORMATS[how.format]
        if table.columns is not None:
            return detect_format(renamed(dict.fromkeys(table.columns), mapping))
        return _format_of_records(table, mapping)
    except DataError as error:
        raise DataError(f"{table.name}: {error}") from error


def _format_of_records(table: Table, mapping: Any) -> Format:
    """That of the first record which has one."""
    first: DataError | None = None
    for raw in islice(table.rows(), _LOOKED_AT):
        try:
            return detect_format(renamed(_record(raw.content), mapping))
        except DataError as error:
            first = first or DataError(f"{raw.place}: {error}")
    raise first or DataError("it has no records")


def _columns(table: Table) -> set[str]:
    """All columns of the first records."""
    looked: Iterator[Raw] = islice(table.rows(), _LOOKED_AT)
    records = (raw.content for raw in looked if isinstance(raw.content, dict))
    return set(chain.from_iterable(records))


def _meaning(format: Format, how: Reading, name: str) -> Meaning:
    mode = how.mode or format.modes[0]
    if mode not in format.modes:
        raise DataError(
            f"{name}: format {format.name} has no mode {mode!r}; it has {', '.join(format.modes)}"
        )
    prompt = how.embedding_prompt or (format.pair_prompt if mode == "pair" else "compress")
    return Meaning(mode, how.turns, how.language_loss, prompt, how.task)
