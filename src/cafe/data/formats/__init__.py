"""The formats of records, one file each, and which one some records are.

A format says what a record means; how records are stored (JSON, parquet, tar, …) is the concern of
`cafe.data.tables`. Any format may come in any storage.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from cafe.data.formats.base import Format
from cafe.data.formats.captions import CAPTIONS
from cafe.data.formats.llava import LLAVA
from cafe.data.formats.messages import MESSAGES
from cafe.data.formats.mmeb import EVALUATION_COLUMNS, MMEB
from cafe.data.formats.pairs import PAIRS
from cafe.data.formats.swift import SWIFT
from cafe.data.records import Record
from cafe.errors import DataError

__all__ = ["FORMATS", "Format", "NoFormat", "check_columns", "detect_format", "renamed"]

FORMATS: dict[str, Format] = {
    format.name: format for format in (LLAVA, MESSAGES, SWIFT, MMEB, PAIRS, CAPTIONS)
}


class NoFormat(DataError):
    """The columns of some records fit no format."""


def detect_format(columns: Collection[str]) -> Format:
    """The one format that records with these columns are of.

    Raises DataError, which lists the formats, when none fits, or several do.
    """
    names = frozenset(columns)
    fitting = [format for format in FORMATS.values() if format.fits(names)]
    if len(fitting) == 1:
        return fitting[0]
    shown = ", ".join(sorted(names)[:20]) or "none"
    if fitting:
        raise DataError(
            f"the columns ({shown}) fit {' and '.join(f.name for f in fitting)}; set format"
        )
    if names >= EVALUATION_COLUMNS:
        raise DataError("these are queries of MMEB-eval, which are for evaluation, not training")
    layouts = "; ".join(f"{f.name}: {f.layout}" for f in FORMATS.values())
    raise NoFormat(
        f"the columns ({shown}) fit no format; map them, for example columns: "
        f"{{image: …, caption: …}}. Formats are {layouts}"
    )


def check_columns(mapping: Mapping[str, str], present: Collection[str]) -> None:
    """That a column map is of names that a format reads to columns that there are.

    Raises DataError naming the nearest of each.
    """
    known = sorted(set().union(*(format.columns for format in FORMATS.values())))
    for name, column in mapping.items():
        if name not in known:
            raise DataError(f"columns: no format reads {name!r}{_nearest(name, known)}")
        if column not in present:
            raise DataError(
                f"columns: {name} is {column!r}, and there is no such column"
                f"{_nearest(column, present)}; there are {', '.join(sorted(present)) or 'none'}"
            )


def renamed(record: Record, mapping: Mapping[str, str]) -> Record:
    """The record as a format knows it: mapped columns under their new names, the others as well.

    A column that a new name hides is gone.
    """
    moved = set(mapping.values())
    kept = {name: value for name, value in record.items() if name not in moved}
    return kept | {name: record[column] for name, column in mapping.items() if column in record}


def _nearest(name: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
