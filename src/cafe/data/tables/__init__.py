"""How records are stored, and which storage a path names.

    .json                       one list of records; COCO's captions; Karpathy's splits
    .jsonl  .ndjson             one record per line
    .csv  .tsv                  a header line, one record per line
    .txt  .token                an image and a caption per line (`cafe.data.tables.captions`)
    .parquet                    one record per row, images inside or in files
    .tar, shard-{000..127}.tar  WebDataset samples
    hub:OWNER/NAME[:CONFIG]     a data set of the Hugging Face hub
    a folder                    metadata.jsonl or .csv with images; captions.txt, .csv or .json;
                                tar shards; images with a text file each; or whatever the
                                `datasets` library saved or reads there

A storage knows nothing of formats: what a record means is the concern of `cafe.data.formats`.
"""

from __future__ import annotations

from pathlib import Path

from cafe.data.columns import with_image_folder
from cafe.data.records import RawRecord, Table
from cafe.data.tables.captioned import captioned_folder
from cafe.data.tables.captions import SUFFIXES, caption_layout, caption_lines
from cafe.data.tables.published import json_file
from cafe.data.tables.splits import files_of_split
from cafe.data.tables.tar import expand, is_shards, shards
from cafe.data.tables.text import LINES, SEPARATED, json_lines, separated, text_lines
from cafe.errors import DataError, quoted
from cafe.files import check_is_content, is_system_file

__all__ = ["HUB", "RawRecord", "Table", "open_table"]

HUB = "hub:"
"""Begins the name of a data set on the hub."""

_METADATA = ("metadata.jsonl", "metadata.csv", "captions.txt", "captions.csv", "captions.json")


def open_table(path: str | Path, *, split: str | None = None, index: Path | None = None) -> Table:
    """Find out how the records at `path` are stored.

    split   of a data set that has several
    index   a folder for the indices of archives, see `cafe.data.tables.tar`
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
    check_is_content(path)
    suffix = path.suffix.lower()
    if suffix in LINES:
        return with_image_folder(json_lines(path))
    if suffix in {*SEPARATED, *SUFFIXES}:
        return _lines(path, suffix)
    if suffix == ".parquet":
        from cafe.data.tables.arrow import parquet

        return parquet(path)
    return with_image_folder(json_file(path, split))


def _lines(path: Path, suffix: str) -> Table:
    """A file with a header line that its suffix says how to read, or any file of captions."""
    layout = caption_layout(path)
    if layout and (layout.names is None or layout.separator != SEPARATED.get(suffix)):
        return caption_lines(path, layout)
    if suffix in SEPARATED:
        return with_image_folder(separated(path))
    first = next((line for _, line in text_lines(path) if line.strip()), "")
    raise DataError(
        f"{path}: expected lines of an image and a caption (a header such as image,caption; "
        f"image<TAB>caption; name.jpg#0<TAB>caption), and its first line is {quoted(first, 80)}"
    )


def _folder(path: Path, split: str | None, index: Path | None) -> Table:
    own = [path / split] if split is not None and (path / split).is_dir() else []
    for folder in (path, *own):
        for name in _METADATA:
            if (folder / name).is_file():
                return open_table(folder / name, split=split)
        archives = [file for file in sorted(folder.glob("*.tar")) if not is_system_file(file)]
        if archives:
            return shards(files_of_split(archives, split, str(folder)), str(folder), index)
    if (table := captioned_folder(own[0] if own else path)) is not None:
        return table
    from cafe.data.tables.arrow import dataset_folder

    return dataset_folder(path, split)
