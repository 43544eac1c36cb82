"""WebDataset shards: tar archives in which files of one name, but for the suffix, are one sample.

    00000.tar:  000000000.jpg  000000000.txt  000000000.json  000000001.jpg  …

A shard is read through once, for the places of its pictures and the text of its samples; that index
is kept in a folder beside the run. Pictures are read from their place in the archive when a worker
needs them, nothing is unpacked; texts stay in memory (about 1.2 kB per sample in all). So samples
are numbered, shuffled, shared by ranks and resumed as those of any other file. Format:
https://github.com/webdataset/webdataset.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cafe.data.tables.base import Raw, Table, first_line
from cafe.data.tables.text import parse_json
from cafe.errors import DataError, ImageError
from cafe.types import Stored

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_PICTURES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
_TEXTS = {"json", "txt", "caption"}


@dataclass(frozen=True, slots=True)
class FileSlice(Stored):
    """A file inside an archive: bytes `offset` to `offset + size` of `path`."""

    path: Path
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.path}:{self.member}"

    def read(self) -> bytes:
        """Raises ImageError when the archive is gone or shorter than it was."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise ImageError(f"picture {self.name!r}: {error.strerror}") from error
        if len(content) < self.size:
            raise ImageError(f"picture {self.name!r}: {self.path} is shorter than it was")
        return content


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a shard.

    pictures   [(member, offset, size)] in the order of their names
    texts      suffix -> text; bytes that are not UTF-8 are surrogate escapes
    """

    key: str
    pictures: list[tuple[str, int, int]]
    texts: dict[str, str]


def is_shards(path: str | Path) -> bool:
    """Whether a path, which may hold `{000..127}`, names tar archives."""
    return str(path).lower().endswith((".tar", ".tar.gz", ".tgz"))


def expand(pattern: str) -> list[str]:
    """`s-{00..02}.tar` -> s-00.tar, s-01.tar, s-02.tar; `{a,b}` as well."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    inside = found[1]
    if numbers := _RANGE.fullmatch(inside):
        width = len(numbers[1])
        choices = [f"{n:0{width}d}" for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        choices = inside.split(",")
    return [
        whole
        for choice in choices
        for whole in expand(pattern[: found.start()] + choice + pattern[found.end() :])
    ]


def shards(paths: Sequence[Path], name: str, index: Path | None) -> Table:
    """The samples of all shards in order.

    index   the folder that keeps what was found, for the next time; None: nothing is kept
    Raises DataError when there is no shard, or one that cannot be read to its end.
    """
    if not paths:
        raise DataError(f"{name}: names no shard; write shard-{{000..127}}.tar")
    found = [(path, _indexed(path, index)) for path in paths]

    def rows() -> Iterator[Raw]:
        for path, samples in found:
            for sample in samples:
                yield Raw(f"{path.name}, sample {sample.key!r}", sample.key, _content(path, sample))

    return Table(name, paths[0].parent, None, rows)


def _content(path: Path, sample: Sample) -> Any:
    """A sample as a record: the keys of its JSON, `image` (or `images`), `caption`."""
    record: dict[str, Any] = {"id": sample.key}
    if "json" in sample.texts:
        content = parse_json(sample.texts["json"].encode("utf-8", "surrogateescape"))
        if not isinstance(content, dict):
            error = DataError(f"{sample.key}.json holds no object, expected one")
            return content if isinstance(content, DataError) else error
        record |= content
    for suffix in ("txt", "caption"):
        if suffix in sample.texts:
            text = sample.texts[suffix]
            try:
                text.encode()
            except UnicodeEncodeError:  # it holds surrogate escapes
                return DataError(f"{sample.key}.{suffix} is not UTF-8 text")
            record.setdefault("caption", text)
    pictures = [FileSlice(path, *place) for place in sample.pictures]
    if pictures:
        record.pop("images", None)
        record["image"] = pictures[0] if len(pictures) == 1 else pictures
    return record


# ---------------------------------------------------------------------- the index


def _indexed(path: Path, index: Path | None) -> list[Sample]:
    """The samples of a shard, from the index if it is of this very file."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: no such file; check the shard numbers in the path") from error
    state = [str(path.absolute()), stat.st_size, stat.st_mtime_ns]
    digest = hashlib.blake2b(state[0].encode(), digest_size=8).hexdigest()
    kept = None if index is None else index / f"{path.stem}-{digest}.json"
    if kept is not None and kept.is_file():
        try:
            content = json.loads(kept.read_bytes())
            if content["shard"] == state:
                return [
                    Sample(k, [(m, o, n) for m, o, n in p], t) for k, p, t in content["samples"]
                ]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # half written, or of another version: made anew
    samples = list(scan(path))
    if kept is not None:
        _write(kept, {"shard": state, "samples": [[s.key, s.pictures, s.texts] for s in samples]})
    return samples


def _write(path: Path, content: Any) -> None:
    """All or nothing: several processes may write the same index."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(content))
        unfinished.replace(path)
    except OSError as error:
        raise DataError(f"{path}: the index cannot be written ({error.strerror})") from error


def scan(path: Path) -> Iterator[Sample]:
    """Read a shard's headers and texts. Raises DataError, saying where it is broken."""
    if path.suffix.lower() != ".tar":
        raise DataError(
            f"{path}: pictures of a compressed archive cannot be read one by one; gunzip it"
        )
    last, size = "its beginning", path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            members = ((*_split(member.name), member) for member in archive if member.isfile())
            for key, group in itertools.groupby(members, key=lambda entry: entry[0]):
                sample = _sample(archive, key, [(suffix, member) for _, suffix, member in group])
                last = f"sample {key!r}"
                yield sample
            _check_end(archive)
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(
            f"{path}: broken after {last} ({first_line(error)}; {size:,} bytes); fetch it again or "
            "leave it out"
        ) from error


def _split(name: str) -> tuple[str, str]:
    """`a/0001.seg.png` -> a/0001, seg.png: the suffix begins at the first point of the name."""
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, suffix.lower()


def _sample(
    archive: tarfile.TarFile, key: str, members: Sequence[tuple[str, tarfile.TarInfo]]
) -> Sample:
    pictures: list[tuple[str, int, int]] = []
    texts: dict[str, str] = {}
    for suffix, member in members:
        if suffix.rpartition(".")[2] in _PICTURES:
            pictures.append((member.name, member.offset_data, member.size))
        elif suffix in _TEXTS:
            file = archive.extractfile(member)
            assert file is not None  # it is a file
            texts[suffix] = file.read().decode("utf-8", "surrogateescape")
    return Sample(key, sorted(pictures), texts)


def _check_end(archive: tarfile.TarFile) -> None:
    """`tarfile` takes any nonsense between two members for the end, which is a block of zeros."""
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise tarfile.ReadError(f"no end mark at byte {archive.offset:,}")
