"""How records are stored, and which storage a path names.

    .json                       one list of records
    .jsonl  .ndjson             one record per line
    .csv  .tsv                  a head line, one record per line
    .parquet                    one record per row, pictures inside or beside
    .tar, shard-{000..127}.tar  WebDataset samples
    hub:OWNER/NAME[:CONFIG]     a data set of the Hugging Face hub
    a folder                    metadata.jsonl or .csv beside pictures; tar shards; or whatever the
                                `datasets` library saved or reads there

A storage knows nothing of formats: what a record means is the concern of `cafe.data.formats`.
"""

from __future__ import annotations

from pathlib import Path

from cafe.data.tables.base import Raw, Table
from cafe.data.tables.tar import expand, is_shards, shards
from cafe.data.tables.text import LINES, SEPARATED, json_lines, json_list, separated
from cafe.errors import DataError

__all__ = ["HUB", "Raw", "Table", "open_table"]

HUB = "hub:"
"""Begins the name of a data set on the hub."""

_METADATA = ("metadata.jsonl", "metadata.csv")


def open_table(path: str | Path, *, split: str | None = None, index: Path | None = None) -> Table:
    """Find out how the records at `path` are stored.

    split   of a data set that has several
    index   a folder for what is found out about archives, see `cafe.data.tables.tar`
    Raises DataError when nothing is there, or it cannot be read.
    """
    name = str(path)
    if name.startswith(HUB):
        from cafe.data.tables.arrow import hub

        return hub(name, split)
    if is_shards(path):
        return shards([Path(one) for one in expand(name)], name, index)
    path = Path(path)
    if path.is_dir():
        return _folder(path, split, index)
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; name a file or folder of records, or {HUB}OWNER/NAME for a "
            "data set of the hub"
        )
    suffix = path.suffix.lower()
    if suffix in LINES:
        return json_lines(path)
    if suffix in SEPARATED:
        return separated(path)
    if suffix == ".parquet":
        from cafe.data.tables.arrow import parquet

        return parquet(path)
    return json_list(path)


def _folder(path: Path, split: str | None, index: Path | None) -> Table:
    for folder in (path, *([] if split is None else [path / split])):
        for name in _METADATA:
            if (folder / name).is_file():
                return open_table(folder / name)
        if archives := sorted(folder.glob("*.tar")):
            return shards(archives, str(folder), index)
    from cafe.data.tables.arrow import dataset_folder

    return dataset_folder(path, split)
