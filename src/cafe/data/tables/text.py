"""Text files of records: a JSON list, JSON lines, comma- or tab-separated values."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cafe.data.records import kind
from cafe.data.tables.base import Raw, Table, cannot_be_read
from cafe.errors import DataError

LINES = frozenset({".jsonl", ".ndjson"})
"""File names that end so hold one record per line."""

SEPARATED = {".csv": ",", ".tsv": "\t"}


def json_lines(path: Path) -> Table:
    """Empty lines are passed over; a line that is not JSON is a record that cannot be read."""

    def rows() -> Iterator[Raw]:
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield Raw(f"line {number}", f"{path.stem}-{number}", parse_json(line))
        except OSError as error:
            raise cannot_be_read(path, error) from error

    return Table(str(path), path.parent, None, rows)


def json_list(path: Path) -> Table:
    """One list of records. Raises DataError, with line and column, when it is none."""
    content = _whole_list(path)

    def rows() -> Iterator[Raw]:
        for number, record in enumerate(content, 1):
            yield Raw(f"record {number}", f"{path.stem}-{number}", record)

    return Table(str(path), path.parent, None, rows)


def separated(path: Path) -> Table:
    """A head line of column names, then one record per line; empty fields are null."""
    separator = SEPARATED[path.suffix.lower()]

    def rows() -> Iterator[Raw]:
        for number, record in enumerate(_separated_rows(path, separator), 1):
            fields = {name: value or None for name, value in record.items() if name is not None}
            yield Raw(f"record {number}", f"{path.stem}-{number}", fields)

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file, delimiter=separator), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise cannot_be_read(path, error) from error
    return Table(str(path), path.parent, frozenset(names), rows)


def parse_json(text: bytes) -> Any:
    """The value of a JSON text, or the DataError that says why it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    return DataError(f"not JSON ({reason}); mend it or leave it out")


def _separated_rows(path: Path, separator: str) -> Iterator[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter=separator)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise cannot_be_read(path, error) from error


def _whole_list(path: Path) -> list[Any]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise cannot_be_read(path, error) from error
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        mend = "; a file of one record per line is named .jsonl" if "Extra" in error.msg else ""
        reason = error.msg if text.strip() else "the file is empty"
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({reason}){mend}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of records, found {kind(content)}")
    return content
