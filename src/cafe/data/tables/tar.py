"""WebDataset shards: tar archives in which files of one name, but for the suffix, are one sample.

    00000.tar:  000000000.jpg  000000000.txt  000000000.json  000000001.jpg  …
    photos.tar: mug.v1.jpg  mug.v1.txt  mug.v2.jpg  mug.v2.txt

A suffix begins at the first point of a name, as in WebDataset. Where no file of a sample has a
known suffix then, and one is a text, it begins at the last: mug.v1 and mug.v2 are two samples.

A shard is read once, for the positions of its images and the text of its samples; that index
is kept in a folder of the run. Images are read from their position in the archive when a worker
needs them, nothing is unpacked; texts stay in memory (about 1.2 kB per sample in all). So samples
are numbered, shuffled, shared by ranks and resumed as those of any other file. Format:
https://github.com/webdataset/webdataset.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tarfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cafe.audio import AUDIO_SUFFIXES, is_audio_name
from cafe.data.records import RawRecord, Table
from cafe.data.tables.captioned import MAX_TEXT_BYTES, too_large
from cafe.data.tables.text import parse_json
from cafe.errors import DataError, ImageError, first_line, quoted
from cafe.files import check_is_content, is_system_file, write_json
from cafe.media import IMAGE_SUFFIXES
from cafe.types import StoredFile

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_MOST_SHARDS = 100_000
_MOST_BRACES = 16
_TEXTS = {"json", "txt", "caption"}
_MEDIA = IMAGE_SUFFIXES | AUDIO_SUFFIXES
_LAYOUT = 3
"""Of a kept index; one of an earlier version is made again."""


@dataclass(frozen=True, slots=True)
class FileSlice(StoredFile):
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
            raise ImageError(f"image {self.name!r}: {error.strerror}") from error
        if len(content) < self.size:
            raise ImageError(f"image {self.name!r}: {self.path} is shorter than it was")
        return content


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a shard.

    images      [(member, offset, size)], recordings too, in the order of their names
    texts       suffix -> text; bytes that are not UTF-8 are surrogate escapes
    too_large   name and size of a text that was not read
    """

    key: str
    images: list[tuple[str, int, int]]
    texts: dict[str, str]
    too_large: tuple[str, int] | None = None


def is_shards(path: str | Path) -> bool:
    """Whether a path, which may hold `{000..127}`, names tar archives."""
    return str(path).lower().endswith((".tar", ".tar.gz", ".tgz"))


def expand(pattern: str) -> list[str]:
    """`s-{00..02}.tar` -> s-00.tar, s-01.tar, s-02.tar; `{a,b}` as well.

    Raises:
        DataError: These are more than `_MOST_SHARDS` names.
    """
    count = 1
    for braces in _BRACES.findall(pattern):
        numbers = _RANGE.fullmatch(braces)
        own = int(numbers[2]) - int(numbers[1]) + 1 if numbers else braces.count(",") + 1
        count *= max(own, 0)
    if count > _MOST_SHARDS or pattern.count("{") > _MOST_BRACES:
        raise DataError(
            f"{quoted(pattern)}: names {count:,} shards; name at most {_MOST_SHARDS:,}, with at "
            f"most {_MOST_BRACES} braces"
        )
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    inside = match[1]
    if numbers := _RANGE.fullmatch(inside):
        width = len(numbers[1])
        choices = [f"{n:0{width}d}" for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        choices = inside.split(",")
    return [
        whole
        for choice in choices
        for whole in expand(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def shards(paths: Sequence[Path], name: str, index: Path | None) -> Table:
    """The samples of all shards in order.

    index   the folder that keeps the index for the next time; None: it is not kept
    Raises DataError when there is no shard, or one that cannot be read to its end.
    """
    if not paths:
        raise DataError(f"{name}: names no shard; write shard-{{000..127}}.tar")
    indexed = [(path, _indexed(path, index)) for path in paths]

    def rows() -> Iterator[RawRecord]:
        for path, samples in indexed:
            for sample in samples:
                yield RawRecord(
                    f"{path.name}, sample {sample.key!r}", sample.key, _content(path, sample)
                )

    return Table(name, paths[0].parent, None, rows)


def _content(path: Path, sample: Sample) -> Any:
    """A sample as a record: the keys of its JSON, `image` and `audio`, `caption`."""
    record: dict[str, Any] = {"id": sample.key}
    if sample.too_large is not None:
        return too_large(*sample.too_large)
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
    files = [FileSlice(path, *place) for place in sample.images]
    recordings = [file for file in files if is_audio_name(file.member)]
    images = [file for file in files if not is_audio_name(file.member)]
    for found, name, plural in ((images, "image", "images"), (recordings, "audio", "audios")):
        if found:
            record.pop(plural, None)
            record[name] = found[0] if len(found) == 1 else found
    return record


# ---------------------------------------------------------------------- the index


def _indexed(path: Path, index: Path | None) -> list[Sample]:
    """The samples of a shard, from the index if it is of this very file."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: no such file; check the shard numbers in the path") from error
    state = [str(path.absolute()), stat.st_size, stat.st_mtime_ns, _LAYOUT]
    digest = hashlib.blake2b(state[0].encode(), digest_size=8).hexdigest()
    kept = None if index is None else index / f"{path.stem}-{digest}.json"
    if kept is not None and kept.is_file():
        try:
            content = json.loads(kept.read_bytes())
            if content["shard"] == state:
                return [
                    Sample(k, [(m, o, n) for m, o, n in p], t, None if e is None else (e[0], e[1]))
                    for k, p, t, e in content["samples"]
                ]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # half written, or of another version: rebuilt
    samples = list(scan(path))
    if kept is not None:
        entries = [[s.key, s.images, s.texts, s.too_large] for s in samples]
        write_json(kept, {"shard": state, "samples": entries}, indent=None)
    return samples


def scan(path: Path) -> Iterator[Sample]:
    """Read a shard's headers and texts. Raises DataError, saying where it is broken."""
    if path.suffix.lower() != ".tar":
        raise DataError(
            f"{path}: images of a compressed archive cannot be read one by one; gunzip it"
        )
    check_is_content(path)
    last, size = "its beginning", path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            files = (m for m in archive if m.isfile() and not is_system_file(PurePosixPath(m.name)))
            members = ((*_split(member.name), member) for member in files)
            for _, group in itertools.groupby(members, key=lambda entry: _composed(entry[0])):
                for key, named in _samples_of(list(group)):
                    sample = _sample(archive, key, named)
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


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


Named = tuple[str, str, tarfile.TarInfo]
"""Key, suffix and member."""


def _samples_of(members: list[Named]) -> Iterator[tuple[str, list[Named]]]:
    """The samples of members that are alike up to the first point, with their keys."""
    known = [suffix for _, suffix, _ in members if _kind(suffix.rpartition(".")[2])]
    texts = [suffix for suffix in known if suffix.rpartition(".")[2] in _TEXTS]
    if not texts or not all("." in suffix for suffix in known):
        yield members[0][0], members
        return
    again = [
        (str(PurePosixPath(member.name).with_suffix("")), suffix.rpartition(".")[2], member)
        for _, suffix, member in members
    ]
    for _, group in itertools.groupby(again, key=lambda entry: _composed(entry[0])):
        sample = list(group)
        yield sample[0][0], sample


def _kind(suffix: str) -> bool:
    return suffix in _MEDIA or suffix in _TEXTS


def _sample(archive: tarfile.TarFile, key: str, members: Sequence[Named]) -> Sample:
    images: list[tuple[str, int, int]] = []
    texts: dict[str, str] = {}
    excess: tuple[str, int] | None = None
    for _, suffix, member in members:
        if suffix.rpartition(".")[2] in _MEDIA:
            images.append((member.name, member.offset_data, member.size))
        elif suffix in _TEXTS and member.size > MAX_TEXT_BYTES:
            excess = (member.name, member.size)
        elif suffix in _TEXTS:
            file = archive.extractfile(member)
            assert file is not None  # it is a file
            texts[suffix] = file.read().decode("utf-8", "surrogateescape")
    return Sample(key, sorted(images), texts, excess)


def _check_end(archive: tarfile.TarFile) -> None:
    """`tarfile` takes any nonsense between two members for the end, which is a block of zeros."""
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise tarfile.ReadError(f"no end mark at byte {archive.offset:,}")
