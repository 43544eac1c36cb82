"""Captions as people keep them: lines of an image and a caption, or a text file beside each image.

    image,caption                    a header line, then fields between commas, semicolons, tabs or
    mug.jpg,A red mug, on a table.   "|" (Flickr8k's and Flickr30k's files on Kaggle)
    mug.jpg<TAB>A red mug.           no header line
    mug.jpg#0<TAB>A red mug.         Flickr8k.token.txt, results_20130124.token
    mug.jpg + mug.txt                a folder

A caption with separators in it that are not quoted is one caption all the same. Neighbouring lines
about one image are one record with several captions.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from cafe.data.columns import CAPTION, IMAGE, image_folder, is_image_name
from cafe.data.records import RawRecord, Table, cannot_be_read
from cafe.data.tables.text import LARGEST_FIELD, text_lines, too_many_fields
from cafe.errors import DataError, quoted

SUFFIXES = frozenset({".txt", ".token"})
"""Suffixes of files that have no other meaning than captions, if they have that."""

_SEPARATORS = "\t|;,"
_PROBED = 20  # lines
_NUMBER = re.compile(r"#\d+$")
_UNSEPARATED = re.compile(r"\d+\s+(?P<caption>\S.*)")
"""A number and a caption with no separator between, as in one line of Flickr30k's results.csv."""


@dataclass(frozen=True, slots=True)
class CaptionLayout:
    """How the lines of a file hold an image and a caption.

    separator   between fields
    names       of the columns, as the header line has them; None: there is no header line
    """

    separator: str
    names: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Line:
    """One caption. `image`: None where `caption` is the reason why the line cannot be read."""

    number: int
    image: str | None
    caption: str | DataError


def caption_layout(path: Path) -> CaptionLayout | None:
    """How a text file holds images with captions; None: its first lines are something else.

    Raises:
        DataError: The file cannot be read, or is no text.
    """
    lines = list(islice((line for _, line in text_lines(path) if line.strip()), _PROBED))
    for separator in _SEPARATORS if lines else ():
        names = [name.strip().strip('"') for name in lines[0].split(separator)]
        if not {*IMAGE}.isdisjoint(names) and not {*CAPTION}.isdisjoint(names):
            return CaptionLayout(separator, tuple(names))
    for separator in _SEPARATORS if lines else ():
        if all(separator in line and _image_of(line, separator) for line in lines):
            return CaptionLayout(separator)
    return None


def caption_lines(path: Path, layout: CaptionLayout) -> Table:
    """The images of a file with the captions of each, several where lines follow one another."""
    image = next((n for n in IMAGE if n in (layout.names or ())), "image")
    caption = next((n for n in CAPTION if n in (layout.names or ())), "caption")

    def rows() -> Iterator[RawRecord]:
        for name, group in groupby(_parsed(path, layout), key=lambda line: line.image):
            lines = list(group)
            if name is None:
                for line in lines:
                    yield RawRecord(
                        f"line {line.number}", f"{path.stem}-{line.number}", line.caption
                    )
                continue
            first, last = lines[0].number, lines[-1].number
            location = f"line {first}" if first == last else f"lines {first}-{last}"
            captions = [line.caption for line in lines]
            yield RawRecord(location, name, {image: name, caption: captions})

    named = [line.image for line in islice(_parsed(path, layout), _PROBED) if line.image]
    folder = image_folder(path.parent, named)
    return Table(str(path), folder, frozenset({image, caption}), rows)


def _parsed(path: Path, layout: CaptionLayout) -> Iterator[_Line]:
    lines = (f"{line}\n" for _, line in text_lines(path))
    if layout.names is None and layout.separator == "\t":
        numbered = enumerate((line.rstrip("\n").split("\t", 1) for line in lines), 1)
    else:
        numbered = _fields(path, lines, layout)
    for number, fields in numbered:
        if not any(field.strip() for field in fields):
            continue
        try:
            yield _line(number, fields, layout)
        except DataError as error:
            yield _Line(number, None, error)


def _fields(
    path: Path, lines: Iterator[str], layout: CaptionLayout
) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields, without the header. Flickr30k's "|" are not those of a CSV writer,
    so quotation marks between them are part of the caption.
    """
    csv.field_size_limit(LARGEST_FIELD)
    quoting = csv.QUOTE_NONE if layout.separator == "|" else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=layout.separator, quoting=quoting)
    try:
        for number, fields in enumerate(reader):
            if number or layout.names is None:
                yield reader.line_num, fields
    except csv.Error as error:
        raise cannot_be_read(path, error) from error


def _line(number: int, fields: Sequence[str], layout: CaptionLayout) -> _Line:
    names = layout.names or ("image", "caption")
    if len(fields) > len(names):
        *fields, extra = [*fields[: len(names)], fields[len(names) :]]
        if any(extra) and names[-1] not in CAPTION:
            raise too_many_fields(len(fields) + len(extra), len(names), layout.separator)
        if any(extra):
            fields = [*fields[:-1], layout.separator.join([fields[-1], *extra])]
    values = dict(zip(names, fields, strict=False))
    image = next((v for n in IMAGE if (v := values.get(n, "").strip())), "")
    caption = next((v for n in CAPTION if (v := values.get(n, "").strip())), "")
    if (
        not caption
        and len(fields) < len(names)
        and (found := _UNSEPARATED.match(fields[-1].strip()))
    ):
        caption = found["caption"]
    if not image or not caption:
        missing = "caption" if image else "image"
        raise DataError(f"it has no {missing} ({quoted(layout.separator.join(fields), 80)})")
    try:
        caption.encode()
    except UnicodeEncodeError as error:  # it holds surrogate escapes
        raise DataError("not UTF-8 text") from error
    return _Line(number, _NUMBER.sub("", image) if layout.names is None else image, caption)


def _image_of(line: str, separator: str) -> bool:
    """Whether a line begins with the name of an image, which may be numbered (`#0`)."""
    return is_image_name(_NUMBER.sub("", line.split(separator, 1)[0].strip().strip('"')))


# ---------------------------------------------------------------------- a folder
