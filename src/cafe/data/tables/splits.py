"""Which split the files of a data set are of, by their names.

    train-00000-of-00002.parquet   original-00000-of-00001.parquet    as the hub names files
    val-000000.tar   00000_test.tar                                   a usual name among the words

The `datasets` library knows only the usual names, and takes all other files for one split: a data
set whose splits are called otherwise would be read as their mixture.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from cafe.data.records import NoSuchSplit
from cafe.errors import DataError
from cafe.files import files_in

_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_USUAL = {
    name: split
    for split, names in {
        "train": ("train", "training"),
        "validation": ("validation", "valid", "val", "dev"),
        "test": ("test", "testing", "eval", "evaluation"),
    }.items()
    for name in names
}
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json"} | {
    ".csv": "csv"
}
"""Suffixes of files of records -> the name of what reads them in `datasets`."""


def split_of(file: Path) -> str | None:
    """The split that a file's name says it is of; None: it says none."""
    stem = file.name.partition(".")[0]
    shard = _SHARD.fullmatch(stem)
    words = re.split(r"[-_]", (shard[1] if shard else stem).lower())
    usual = next((_USUAL[word] for word in words if word in _USUAL), None)
    return usual or (shard[1] if shard else None)


def chosen_split(splits: Collection[str], wanted: str | None, name: str) -> str:
    """The split to read: the one that is wanted, the only one, or "train".

    Raises:
        NoSuchSplit: It is not there, or none is wanted and there are several without "train".
    """
    there = sorted(splits)
    chosen = wanted or ("train" if "train" in there else there[0] if len(there) == 1 else None)
    if chosen is not None and chosen not in there:
        chosen = _USUAL.get(chosen, chosen)
    if chosen not in there:
        raise NoSuchSplit(name, wanted, there)
    return chosen


def files_of_split(files: Sequence[Path], wanted: str | None, name: str) -> list[Path]:
    """Those of `files` that are of one split; all where their names say nothing of splits.

    Raises:
        DataError: As `chosen_split`; none is wanted, and only some names say which split it is.
    """
    splits = {file: split_of(file) for file in files}
    named = {split for split in splits.values() if split is not None}
    if not named:
        return list(files)
    if wanted is None and None in splits.values():
        raise DataError(
            f"{name}: some files are of split {', '.join(sorted(named))} by their names, others of "
            "none; set split, or name the files"
        )
    chosen = chosen_split(named, wanted, name)
    return [file for file in files if splits[file] == chosen]


def unusual_splits(folder: Path) -> list[Path]:
    """The files of records in a folder if names say that some are of a split `datasets` would miss.

    Empty where it finds the splits itself, be it by the data set's card.
    """
    card = folder / "README.md"
    if card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace"):
        return []
    files = [file for file in files_in(folder) if file.suffix.lower() in BUILDERS]
    splits = [split_of(file) for file in files]
    if None in splits or set(splits) <= set(_USUAL.values()):
        return []
    return [folder / file for file in files]
