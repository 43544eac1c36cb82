"""Text files of records: a JSON list, JSON lines, comma- or tab-separated values."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cafe.data.columns import CAPTION
from cafe.data.records import RawRecord, Table, cannot_be_read
from cafe.errors import DataError

LINES = frozenset({".jsonl", ".ndjson"})
"""Suffixes of files with one record per line."""

_MARKS = (  # UTF-32's begins like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PROBED = 65_536  # bytes
LARGEST_FIELD = 1 << 28
"""Characters of one field; `csv` reads 131,072 unless told, and an image in base64 has more."""

SEPARATED = {".csv": ",", ".tsv": "\t"}
_OTHERS = "\t;|,"


def json_lines(path: Path) -> Table:
    """One record per line, without empty lines; a line that is not JSON is a broken record."""

    def rows() -> Iterator[RawRecord]:
        for number, line in text_lines(path):
            if line.strip():
                content = parse_json(line.encode("utf-8", "surrogateescape"))
                yield RawRecord(f"line {number}", f"{path.stem}-{number}", content)

    return Table(str(path), path.parent, None, rows)


def json_list(path: Path, content: list[Any]) -> Table:
    """The list of records that a file holds."""

    def rows() -> Iterator[RawRecord]:
        for number, record in enumerate(content, 1):
            yield RawRecord(f"record {number}", f"{path.stem}-{number}", record)

    return Table(str(path), path.parent, None, rows)


def separated(path: Path) -> Table:
    """A header line of column names, then one record per line; empty fields are null.

    Where the header has no separator of the file's suffix, it may have another: ";" in a .csv is
    what spreadsheets write in many languages.
    """
    csv.field_size_limit(LARGEST_FIELD)
    try:
        with path.open(encoding=encoding_of(path), newline="") as file:
            header = file.readline()
            own = SEPARATED[path.suffix.lower()]
            separator = next((s for s in (own, *_OTHERS) if s in header), own)
            file.seek(0)
            names = next(csv.reader(file, delimiter=separator), [])
    except (OSError, UnicodeError, csv.Error) as error:
        raise cannot_be_read(path, error) from error

    def rows() -> Iterator[RawRecord]:
        for number, record in enumerate(_separated_rows(path, separator), 1):
            content = _fields(record, names, separator)
            yield RawRecord(f"record {number}", f"{path.stem}-{number}", content)

    return Table(str(path), path.parent, frozenset(names), rows)


def too_many_fields(count: int, names: int, separator: str) -> DataError:
    """The DataError for a record with more fields than there are columns."""
    return DataError(
        f"it has {count} fields, and the header names {names}; put quotation marks around a field "
        f"that contains {separator!r}"
    )


def _fields(record: dict[Any, Any], names: list[str], separator: str) -> dict[str, Any] | DataError:
    """A record of `csv.DictReader`. A last column of captions also takes what is beyond it:
    captions are often written without quotation marks.
    """
    extra = record.pop(None, [])
    if any(extra) and names[-1] in CAPTION:
        record[names[-1]] = separator.join([record[names[-1]], *extra])
    elif any(extra):
        return too_many_fields(len(names) + len(extra), len(names), separator)
    return {name: value or None for name, value in record.items()}


def parse_json(text: bytes) -> Any:
    """The value of a JSON text, or the DataError that says why it is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    return DataError(f"not JSON ({reason}); fix or remove it")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file without their ends, numbered from 1.

    Lines end with a newline, a carriage return, or both. What is not UTF-8 is surrogate escapes.

    Raises:
        DataError: The file cannot be read, or is no text.
    """
    encoding = encoding_of(path)
    try:
        with path.open(encoding=encoding, errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                yield number, line.removesuffix("\n")
    except (OSError, UnicodeError) as error:
        raise cannot_be_read(path, error) from error


def encoding_of(path: Path) -> str:
    """How a text file is encoded, by the mark at its beginning: UTF-16, UTF-32, else UTF-8.

    Windows PowerShell writes UTF-16 where output is redirected to a file.

    Raises:
        DataError: The file cannot be read, or has null bytes, which no other text has.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(_PROBED)
    except OSError as error:
        raise cannot_be_read(path, error) from error
    for mark, encoding in _MARKS:
        if begin.startswith(mark):
            return encoding
    if b"\0" in begin:
        raise DataError(f"{path}: no UTF-8 text (it has null bytes); save it as UTF-8")
    return "utf-8-sig"


def _separated_rows(path: Path, separator: str) -> Iterator[dict[str, str]]:
    try:
        with path.open(encoding=encoding_of(path), newline="") as file:
            yield from csv.DictReader(file, delimiter=separator)
    except (OSError, UnicodeError, csv.Error) as error:
        raise cannot_be_read(path, error) from error


def whole_json(path: Path) -> Any:
    """The value of a JSON file. Raises DataError, with line and column, when it is not JSON."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise cannot_be_read(path, error) from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; a file of one record per line is named .jsonl" if "Extra" in error.msg else ""
        reason = error.msg if text.strip() else "the file is empty"
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({reason}){hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
