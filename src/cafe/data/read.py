"""Any data set -> examples: how it is stored, which format it has, what each record means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from cafe.data.columns import IMAGE
from cafe.data.formats import (
    FORMATS,
    Format,
    NoFormat,
    check_columns,
    detect_format,
    renamed,
)
from cafe.data.formats.base import scored
from cafe.data.formats.mixture import chosen, is_mixture, read_mixture
from cafe.data.media_paths import MediaResolver
from cafe.data.quarantine import Skipped
from cafe.data.records import ReadOptions, Record, Records, kind
from cafe.data.suggestions import suggestion
from cafe.data.tables import RawRecord, Table, open_table
from cafe.errors import DataError, check_unicode, quoted
from cafe.types import Example

_PROBED = 100  # records to detect the format from, where the storage has no columns
_FIX = "put it there, or set image_root to the folder where images are"
_IMAGE_COLUMNS = frozenset({*IMAGE, "images", "file_name"})


def read_examples(
    path: str | Path,
    options: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
    *,
    index: Path | None = None,
) -> Records:
    """Read a file, folder, mixture or hub data set. Images are referenced, not opened.

    A record that cannot be used is skipped, with its location and the fix: not JSON, a missing
    field, an empty answer, turns that do not alternate, markers that do not match the images, an
    image that is missing or outside of `options.image_root`.

    Args:
        path: As the `path` of a recipe's data source.
        options: How to read it.
        index: A folder that keeps the indices of archives for the next time.

    Returns:
        The examples and the skipped records.

    Raises:
        DataError: The data set itself cannot be read, or its format is ambiguous.
    """
    if not is_mixture(Path(path)):
        table = open_table(path, split=options.split, index=index)
        return _read(table, islice(table.rows(), options.limit), options)
    parts: list[Records] = []
    remaining = options.limit
    for number, portion in enumerate(read_mixture(Path(path))):
        table = open_table(portion.path, split=options.split, index=index)
        raws = list(table.rows())
        wanted = chosen(portion.strategy, len(raws), seed=number)
        parts.append(_read(table, (raws[i] for i in islice(wanted, remaining)), options))
        remaining = None if remaining is None else remaining - min(remaining, len(wanted))
    return Records(
        examples=[example for part in parts for example in part.examples],
        skipped=[item for part in parts for item in part.skipped],
        format=", ".join(dict.fromkeys(part.format for part in parts)),
        changes=sum((part.changes for part in parts), Counter[str]()),
    )


def _read(table: Table, raws: Iterable[RawRecord], options: ReadOptions) -> Records:
    """The examples of every record, and the records that cannot be used."""
    root = options.image_root or table.folder
    media = MediaResolver(root, options.max_pixels, _FIX, options.max_seconds)
    format = _format(table, options)
    options = _resolved(options, format, table.name)
    mapping = options.columns or {}
    check_image_columns(table, mapping, media)
    records = Records([], [], format.name, media.changes)
    for raw in raws:
        location, identity = raw.location, raw.id
        try:
            record = _record(raw.content)
            own = record.get("id")
            if isinstance(own, str | int) and str(own) != identity:
                location, identity = f"{location}, id {quoted(own)}", str(own)
            examples = format.read(identity, renamed(record, mapping), media, options)
            if options.scores is not None:
                examples = scored(examples, record, options.scores, media.changes)
            for text in _texts(examples):
                check_unicode(text)
            records.examples.extend(examples)
        except DataError as error:
            records.skipped.append(Skipped(table.name, location, str(error)))
    return records


def _texts(examples: Iterable[Example]) -> Iterator[str]:
    """All texts of the examples."""
    for example in examples:
        for message in chain.from_iterable(example.conversations):
            yield from (part for part in message.content if isinstance(part, str))


def _record(content: Any) -> Record:
    if isinstance(content, DataError):
        raise content
    if not isinstance(content, dict):
        raise DataError(f"expected an object, found {kind(content)}")
    return content


# ---------------------------------------------------------------------- which format


def _format(table: Table, options: ReadOptions) -> Format:
    """The requested format, or the one that the columns fit."""
    try:
        mapping = options.columns or {}
        if mapping:
            check_columns(mapping, table.columns or _columns(table))
        if options.format != "auto":
            if options.format not in FORMATS:
                raise DataError(f"format {options.format!r}: use one of auto, {', '.join(FORMATS)}")
            return FORMATS[options.format]
        if table.columns is not None:
            return detect_format(renamed(dict.fromkeys(table.columns), mapping))
        return _format_of_records(table, mapping)
    except NoFormat as error:
        contents = (raw.content for raw in islice(table.rows(), _PROBED))
        looks = suggestion([content for content in contents if isinstance(content, dict)])
        raise DataError(f"{table.name}: {error}{f'. {looks}' if looks else ''}") from error
    except DataError as error:
        raise DataError(f"{table.name}: {error}") from error


def _format_of_records(table: Table, mapping: Any) -> Format:
    """The format of the first record that has one."""
    first: DataError | None = None
    for raw in islice(table.rows(), _PROBED):
        try:
            return detect_format(renamed(_record(raw.content), mapping))
        except DataError as error:
            first = first or type(error)(f"{raw.location}: {error}")
    raise first or DataError("it has no records")


def check_image_columns(table: Table, mapping: Mapping[str, str], media: MediaResolver) -> None:
    """Raise DataError where most of the first values of a column of images are texts.

    A wrong column is said once and at once, not by thousands of skipped records.
    """
    first: dict[str, list[Any]] = {}
    for raw in islice(table.rows(), _PROBED):
        if isinstance(raw.content, dict):
            for name, value in renamed(raw.content, mapping).items():
                if name in _IMAGE_COLUMNS or name.endswith("_image"):
                    values = value if isinstance(value, list) else [value]
                    first.setdefault(name, []).extend(v for v in values if v)
    for name, values in first.items():
        texts = [value for value in values if media.is_text(value)]
        if len(values) > 1 and 2 * len(texts) > len(values):
            raise DataError(
                f"{table.name}: column {mapping.get(name, name)!r} is one of images, and "
                f"{len(texts)} of its first {len(values)} values are texts (the first: "
                f"{quoted(texts[0])}); map the right column, see columns"
            )


def _columns(table: Table) -> set[str]:
    """All columns that occur in the first records."""
    probed: Iterator[RawRecord] = islice(table.rows(), _PROBED)
    records = (raw.content for raw in probed if isinstance(raw.content, dict))
    return set(chain.from_iterable(records))


def _resolved(options: ReadOptions, format: Format, name: str) -> ReadOptions:
    """The options with the format's defaults filled in."""
    mode = options.mode or format.modes[0]
    if mode not in format.modes:
        raise DataError(
            f"{name}: format {format.name} has no mode {mode!r}; it has {', '.join(format.modes)}"
        )
    prompt = options.embedding_prompt or (format.pair_prompt if mode == "pair" else "compress")
    return replace(options, mode=mode, embedding_prompt=prompt)
