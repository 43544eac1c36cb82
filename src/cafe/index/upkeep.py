"""Keep an index equal to what it is of: embed what is new or changed, delete what vanished.

What is done is read from the table: there is no other state. A batch is one write, all or nothing,
so a run that is killed loses at most one batch, and the next run does the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from cafe.errors import DataError
from cafe.index.rows import Kind, Known, Row, column_types
from cafe.index.store import only_writer
from cafe.index.table import Encode, Index
from cafe.media import open_image
from cafe.types import Image
from cafe.types import Stored as StoredPicture

MAX_BATCH_PIXELS = 200_000_000
"""Decoded pictures of one batch take at most three bytes times this, plus one picture."""

_COMPACT_EVERY = 500  # batches; a table of very many small files is slow to open
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Item:
    """What should become one row.

    place   where it stands, for messages
    source  the picture, undecoded; None: the item is its text
    text    a picture's caption, or the text itself
    extra   other columns of the data, as `cafe.index.rows.column_name` and `plain` make them
    """

    place: str
    id: str
    source: Image | None = None
    path: str | None = None
    text: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return "text" if self.source is None else "image"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A broken item."""

    place: str
    reason: str


@dataclass(slots=True)
class Report:
    """What a run did. The content of `moved` was there under another id: its vector was kept."""

    added: int = 0
    changed: int = 0
    moved: int = 0
    unchanged: int = 0
    deleted: int = 0
    skipped: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An item that was read. `value` is None for one that needs no embedding of its own.

    twin   id of a row with the same content
    """

    item: Item
    row: Row
    value: Any = None
    same: bool = False
    twin: str | None = None

    @property
    def pixels(self) -> int:
        is_picture = isinstance(self.value, PIL.Image.Image)
        return self.value.width * self.value.height if is_picture else 0


def sync(
    index: Index,
    items: Sequence[Item],
    encode: Encode,
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Make `index` hold exactly `items`.

    encode       pictures (PIL, RGB) and strings -> float32 [n, d]; a DataError means that one of
                 them cannot be embedded: that one is found and skipped
    batch_size   rows of one write, and what `encode` is given at once
    progress     called with the number of items done
    Items whose content and columns are as they were are not touched; a row whose item became
    broken is deleted. Raises DataError, and deletes nothing, when no item can be used.
    """
    with only_writer(index.uri):
        return _Run(index, encode, progress or (lambda _: None)).run(items, batch_size)


class _Run:
    def __init__(self, index: Index, encode: Encode, progress: Callable[[int], None]) -> None:
        self._index = index
        self._encode = encode
        self._progress = progress
        self._known = index.known()
        self._by_content = {(k.kind, k.hash): id for id, k in self._known.items()}
        self._report = Report()
        self._kept: set[str] = set()
        self._writes = 0

    def run(self, items: Sequence[Item], batch_size: int) -> Report:
        self._index.add_columns(column_types(item.extra for item in items))
        batch: list[_Loaded] = []
        pixels = 0
        for done, loaded in enumerate(_ahead(_once(items), self._load), 1):
            match loaded:
                case Skipped():
                    self._report.skipped.append(loaded)
                case _Loaded(same=True):
                    self._kept.add(loaded.item.id)
                    self._report.unchanged += 1
                case _Loaded():
                    batch.append(loaded)
                    pixels += loaded.pixels
            if len(batch) >= batch_size or pixels >= MAX_BATCH_PIXELS:
                self._write(batch)
                batch, pixels = [], 0
            self._progress(done)
        self._write(batch)
        if not self._kept:
            first = self._report.skipped[0] if self._report.skipped else None
            told = f"; the first of {len(self._report.skipped)}: {first}" if first else ""
            raise DataError(f"index {self._index.uri}: no item can be used{told}")
        gone = self._known.keys() - self._kept
        self._index.delete(gone)
        self._report.deleted = len(gone)
        return self._report

    def _load(self, item: Item | Skipped) -> _Loaded | Skipped:
        """Read an item; decode it only if it must be embedded. Runs in several threads."""
        if isinstance(item, Skipped):
            return item
        try:
            _check_texts(item)
            content = _content(item)
            digest = hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()
            row = _row(item, digest)
            if self._known.get(item.id) == Known(row.kind, row.hash, row.record):
                return _Loaded(item, row, same=True)
            twin = self._by_content.get((row.kind, row.hash))
            if twin is not None:
                return _Loaded(item, row, twin=twin)
            return _decoded(item, row, content)
        except DataError as error:
            return _skipped(item, error)

    # ------------------------------------------------------------------ writing

    def _write(self, batch: list[_Loaded]) -> None:
        rows, vectors = self._embedded(batch)
        if not rows:
            return
        there = [row.id in self._known for row in rows]
        for new in (True, False):
            chosen = [i for i, old in enumerate(there) if old is not new]
            self._index.add([rows[i] for i in chosen], vectors[chosen], new=new)
        self._kept.update(row.id for row in rows)
        self._writes += 1
        if self._writes % _COMPACT_EVERY == 0:
            self._index.compact()

    def _embedded(self, batch: list[_Loaded]) -> tuple[list[Row], np.ndarray]:
        """The rows of a batch that can be embedded, and their vectors."""
        twins = self._index.stored(one.twin for one in batch if one.twin is not None)
        rows: list[Row] = []
        vectors: list[np.ndarray] = []
        fresh: list[_Loaded] = []
        for one in batch:
            twin = twins.get(one.twin or "")
            if twin is not None and twin.hash == one.row.hash:
                rows.append(_sized(one.row, twin.width, twin.height))
                vectors.append(twin.vector)
                if one.row.id in self._known:
                    self._report.changed += 1
                else:
                    self._report.moved += 1
            elif one.value is None:  # the twin was written over in this very run
                again = self._decoded_again(one.item)
                fresh.extend([again] if again else [])
            else:
                fresh.append(one)
        embeddings, failures = encode_each(self._encode, [one.value for one in fresh])
        for i, one in enumerate(fresh):
            if i in failures:
                self._report.skipped.append(_skipped(one.item, failures[i]))
                continue
            rows.append(one.row)
            vectors.append(embeddings[i])
            if one.row.id in self._known:
                self._report.changed += 1
            else:
                self._report.added += 1
        return rows, np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)

    def _decoded_again(self, item: Item) -> _Loaded | None:
        try:
            content = _content(item)
            digest = hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()
            return _decoded(item, _row(item, digest), content)
        except DataError as error:
            self._report.skipped.append(_skipped(item, error))
            return None


def encode_each(
    encode: Encode, values: Sequence[Any]
) -> tuple[list[np.ndarray], dict[int, DataError]]:
    """Embeddings [d] of `values`, in order, and the errors of those that `encode` refuses.

    When it refuses them all together they are halved until the broken one is alone.
    """
    nothing = np.zeros(0, np.float32)
    embeddings = [nothing] * len(values)
    failures: dict[int, DataError] = {}
    parts = [range(len(values))] if values else []
    while parts:
        part = parts.pop()
        try:
            found = encode([values[i] for i in part])
        except DataError as error:
            if len(part) == 1:
                failures[part[0]] = error
            else:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
        else:
            for i, embedding in zip(part, found, strict=True):
                embeddings[i] = embedding
    return embeddings, failures


# ---------------------------------------------------------------------- reading


def _once(items: Iterable[Item]) -> Iterator[Item | Skipped]:
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            yield Skipped(item.place, f"id {item.id!r} comes twice; the first is kept")
        else:
            seen.add(item.id)
            yield item


def _ahead(
    items: Iterable[Item | Skipped], load: Callable[[Item | Skipped], _Loaded | Skipped]
) -> Iterator[_Loaded | Skipped]:
    """`load` of every item, in order; threads read and decode a few ahead of the model."""
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        coming: deque[Future[_Loaded | Skipped]] = deque()
        for item in items:
            coming.append(pool.submit(load, item))
            if len(coming) > 2 * threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _check_texts(item: Item) -> None:
    """Raises DataError for what no column of text can hold; a file's name may be such."""
    for name, value in (("id", item.id), ("text", item.text), *item.extra.items()):
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise DataError(f"{name} holds half a surrogate pair, which is no text") from None


def _content(item: Item) -> bytes:
    if item.source is None:
        return (item.text or "").encode()
    match item.source.source:
        case bytes() as content:
            return content
        case StoredPicture() as stored:
            return stored.read()
        case str() | Path() as path:
            try:
                return Path(path).read_bytes()
            except OSError as error:
                raise DataError(f"cannot be read ({error.strerror})") from error
    raise DataError("a decoded picture has no file; give its bytes")


def _row(item: Item, digest: str) -> Row:
    beside = [item.path, None if item.source is None else item.text, dict(item.extra)]
    text = json.dumps(beside, sort_keys=True, default=str)
    record = hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()
    return Row(item.id, item.kind, item.path, item.text, digest, record, extra=item.extra)


def _decoded(item: Item, row: Row, content: bytes) -> _Loaded:
    if item.source is None:
        return _Loaded(item, row, item.text)
    picture = open_image(Image(content, item.source.pixel_budget))
    return _Loaded(item, _sized(row, *picture.size), picture)


def _sized(row: Row, width: int | None, height: int | None) -> Row:
    return replace(row, width=width, height=height)


def _skipped(item: Item, error: DataError) -> Skipped:
    return Skipped(item.place, str(error).removeprefix("picture: "))
