"""Keep an index equal to its source: embed what is new or changed, delete what vanished.

What has been done is read from the table: there is no other state. A batch is one write, all or
nothing, so a run that is killed loses at most one batch, and the next run does the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa

from cafe.batching import encode_each_captioned, prefetch_map
from cafe.errors import DataError
from cafe.index.rows import GENERATED_CAPTION, ContentKind, IndexRow, RowState, column_types
from cafe.index.store import only_writer
from cafe.index.table import Index
from cafe.media import open_image
from cafe.types import Image, StoredFile

MAX_BATCH_PIXELS = 200_000_000
"""Limit of the decoded images of one batch: three bytes each, plus one image."""

COMPACT_EVERY = 500
"""Batches between two compactions: a table of many small files is slow to open."""

WriteCaptions = Callable[[Sequence[Any]], Sequence[str | None]]
"""Images (PIL, RGB) and strings -> what the model says of each image, None for a string."""

EncodeItemTokens = Callable[[Sequence[Any]], Sequence[np.ndarray]]
"""Images (PIL, RGB) and strings -> float32 [tokens, dim] of each (`cafe.index.tokens`)."""

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class IndexItem:
    """What should become one row.

    location  in the source, for messages
    source  the image, undecoded; None: the item is its text
    text    an image's caption, or the text itself
    extra   other columns of the data, as `cafe.index.rows.column_name` and `plain` make them
    """

    location: str
    id: str
    source: Image | None = None
    path: str | None = None
    text: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> ContentKind:
        return "text" if self.source is None else "image"


@dataclass(frozen=True, slots=True)
class SkippedItem:
    """An item that cannot be used, its location and the reason."""

    location: str
    reason: str


@dataclass(slots=True)
class Report:
    """Counts of one run. The content of `moved` existed under another id: its vector was kept.

    silent   of those that were embedded: images that were embedded alone, because the model says
             nothing of them; 0 where it is not asked
    """

    added: int = 0
    changed: int = 0
    moved: int = 0
    unchanged: int = 0
    deleted: int = 0
    skipped: list[SkippedItem] = field(default_factory=list)
    silent: int = 0


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An item that was read.

    value         what is embedded; None: it needs no embedding of its own
    same          its row is up to date
    duplicate_of  id of a row with the same content, whose vector can be copied
    """

    item: IndexItem
    row: IndexRow
    value: Any = None
    same: bool = False
    duplicate_of: str | None = None

    @property
    def pixels(self) -> int:
        is_image = isinstance(self.value, PIL.Image.Image)
        return self.value.width * self.value.height if is_image else 0


def sync(
    index: Index,
    items: Sequence[IndexItem],
    encode: Callable[..., Iterable[Any]],
    *,
    batch_size: int = 64,
    max_batch_pixels: int = MAX_BATCH_PIXELS,
    compact_every: int = COMPACT_EVERY,
    progress: Callable[[int], None] | None = None,
    write_captions: WriteCaptions | None = None,
    encode_tokens: EncodeItemTokens | None = None,
) -> Report:
    """Make `index` hold exactly `items`.

    Items whose content and columns did not change are not touched; a row whose item became broken
    is deleted.

    Args:
        index: the index to bring up to date.
        items: everything that it should hold.
        encode: images (PIL, RGB) and strings -> float32 [n, d]. A DataError means that one of them
            cannot be embedded: it is searched for and skipped. Or n `cafe.batching.WithCaption`,
            if it writes captions itself.
        batch_size: rows of one write, and the most that `encode` gets in one call.
        max_batch_pixels: a batch ends when its decoded images have this many pixels.
        compact_every: batches between two compactions of the table.
        progress: called with the number of items done.
        write_captions: writes the captions with which images are embedded; None: `encode` does, or
            they are embedded alone. `encode` gets them as the keyword `caption`, and the index
            keeps them.
        encode_tokens: what `encode` gets -> the vectors of its tokens; for an index that has them.

    Returns:
        What was added, changed, moved, unchanged, deleted and skipped.

    Raises:
        DataError: no item can be used, in which case nothing is deleted, or another process is
            writing.
    """
    with only_writer(index.uri):
        report = progress or (lambda _: None)
        run = _Run(index, encode, report, compact_every, write_captions, encode_tokens)
        return run.run(items, batch_size, max_batch_pixels)


class _Run:
    def __init__(
        self,
        index: Index,
        encode: Callable[..., Iterable[Any]],
        progress: Callable[[int], None],
        compact_every: int,
        write_captions: WriteCaptions | None,
        encode_tokens: EncodeItemTokens | None,
    ) -> None:
        self._index = index
        self._encode = encode
        self._progress = progress
        self._compact_every = compact_every
        self._write_captions = write_captions
        self._encode_tokens = encode_tokens
        self._generates = write_captions is not None or index.model.generates
        self._known = index.known()
        self._by_content = {(k.kind, k.hash): id for id, k in self._known.items()}
        self._report = Report()
        self._kept: set[str] = set()
        self._writes = 0

    def run(self, items: Sequence[IndexItem], batch_size: int, max_pixels: int) -> Report:
        self._index.add_columns(column_types(item.extra for item in items))
        if self._generates:
            self._index.add_columns({GENERATED_CAPTION: pa.string()})
        batch: list[_Loaded] = []
        pixels = 0
        threads = min(8, os.cpu_count() or 1)  # read and decode a few ahead of the model
        coming = prefetch_map(self._load, _once(items), threads, begun=2 * threads)
        for done, loaded in enumerate(coming, 1):
            match loaded:
                case SkippedItem():
                    self._report.skipped.append(loaded)
                case _Loaded(same=True):
                    self._kept.add(loaded.item.id)
                    self._report.unchanged += 1
                case _Loaded():
                    batch.append(loaded)
                    pixels += loaded.pixels
            if len(batch) >= batch_size or pixels >= max_pixels:
                self._write(batch)
                batch, pixels = [], 0
            self._progress(done)
        self._write(batch)
        if not self._kept:
            first = self._report.skipped[0] if self._report.skipped else None
            reason = f"; the first of {len(self._report.skipped)}: {first}" if first else ""
            raise DataError(f"index {self._index.uri}: no item can be used{reason}")
        gone = self._known.keys() - self._kept
        self._index.delete(gone)
        self._report.deleted = len(gone)
        return self._report

    def _load(self, item: IndexItem | SkippedItem) -> _Loaded | SkippedItem:
        """Read an item; decode it only if it must be embedded. Runs in several threads."""
        if isinstance(item, SkippedItem):
            return item
        try:
            _check_texts(item)
            content = _content(item)
            digest = hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()
            row = _row(item, digest)
            if self._known.get(item.id) == RowState(row.kind, row.hash, row.record):
                return _Loaded(item, row, same=True)
            row = _with_own_text(item, row)
            duplicate_of = self._by_content.get((row.kind, row.hash))
            if duplicate_of is not None:
                return _Loaded(item, row, duplicate_of=duplicate_of)
            return _decoded(item, row, content)
        except DataError as error:
            return _skipped(item, error)

    # ------------------------------------------------------------------ writing

    def _write(self, batch: list[_Loaded]) -> None:
        rows, vectors, tokens = self._embedded(batch)
        if not rows:
            return
        exists = [row.id in self._known for row in rows]
        for new in (True, False):
            chosen = [i for i, old in enumerate(exists) if old is not new]
            own = None if tokens is None else [tokens[i] for i in chosen]
            self._index.add([rows[i] for i in chosen], vectors[chosen], new=new, tokens=own)
        self._kept.update(row.id for row in rows)
        self._writes += 1
        if self._writes % self._compact_every == 0:
            self._index.compact()

    def _embedded(
        self, batch: list[_Loaded]
    ) -> tuple[list[IndexRow], np.ndarray, list[np.ndarray] | None]:
        """The rows of a batch that can be embedded, their vectors, and those of their tokens."""
        stored = self._index.stored(
            one.duplicate_of for one in batch if one.duplicate_of is not None
        )
        rows: list[IndexRow] = []
        vectors: list[np.ndarray] = []
        tokens: list[np.ndarray] = []
        fresh: list[_Loaded] = []
        for one in batch:
            original = stored.get(one.duplicate_of or "")
            if original is not None and original.hash == one.row.hash:
                row = _sized(one.row, original.width, original.height)
                rows.append(_captioned(row, original.generated_caption))
                vectors.append(original.vector)
                tokens += [] if original.tokens is None else [original.tokens]
                if one.row.id in self._known:
                    self._report.changed += 1
                else:
                    self._report.moved += 1
            elif one.value is None:  # this run has overwritten the original in the meantime
                again = self._decoded_again(one.item)
                fresh.extend([again] if again else [])
            else:
                fresh.append(one)
        embeddings, failures = encode_each_captioned(
            self._encode, [one.value for one in fresh], self._write_captions
        )
        for i, one in enumerate(fresh):
            if i in failures:
                self._report.skipped.append(_skipped(one.item, failures[i]))
                continue
            vector, caption = embeddings[i]
            rows.append(_captioned(one.row, caption))
            silent = self._generates and one.row.kind == "image" and caption is None
            self._report.silent += silent
            vectors.append(vector)
            if one.row.id in self._known:
                self._report.changed += 1
            else:
                self._report.added += 1
        stacked = np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)
        if self._encode_tokens is None:
            return rows, stacked, None
        usable = [one.value for i, one in enumerate(fresh) if i not in failures]
        return rows, stacked, [*tokens, *(self._encode_tokens(usable) if usable else ())]

    def _decoded_again(self, item: IndexItem) -> _Loaded | None:
        try:
            content = _content(item)
            digest = hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()
            return _decoded(item, _with_own_text(item, _row(item, digest)), content)
        except DataError as error:
            self._report.skipped.append(_skipped(item, error))
            return None


# ---------------------------------------------------------------------- reading


def _once(items: Iterable[IndexItem]) -> Iterator[IndexItem | SkippedItem]:
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            yield SkippedItem(item.location, f"id {item.id!r} occurs twice; the first is kept")
        else:
            seen.add(item.id)
            yield item


def _check_texts(item: IndexItem) -> None:
    """Raises DataError for text that is not valid Unicode; a file's name can be that, too."""
    for name, value in (("id", item.id), ("text", item.text), *item.extra.items()):
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise DataError(f"{name} contains an unpaired surrogate") from None


def _content(item: IndexItem) -> bytes:
    """What a row's hash is of: the file's bytes, the text, or what is known without reading."""
    if item.source is None:
        return (item.text or "").encode()
    match item.source.source:
        case bytes() as content:
            return content
        case StoredFile() as stored:
            return stored.fingerprint or stored.read()
        case str() | Path() as path:
            try:
                return Path(path).read_bytes()
            except OSError as error:
                raise DataError(f"cannot be read ({error.strerror})") from error
    raise DataError("a decoded image has no file; give its bytes")


def _row(item: IndexItem, digest: str) -> IndexRow:
    others = [item.path, None if item.source is None else item.text, dict(item.extra)]
    text = json.dumps(others, sort_keys=True, default=str)
    record = hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()
    return IndexRow(item.id, item.kind, item.path, item.text, digest, record, extra=item.extra)


def _with_own_text(item: IndexItem, row: IndexRow) -> IndexRow:
    """The row with the text that the container stores for the image, if nothing else is said of it.

    It is read late, and is no part of `record`: it changes only with the image's content.
    """
    source = None if item.source is None else item.source.source
    if item.text is not None or not isinstance(source, StoredFile):
        return row
    text = source.text()
    return row if text is None else replace(row, text=text)


def _decoded(item: IndexItem, row: IndexRow, content: bytes) -> _Loaded:
    if item.source is None:
        return _Loaded(item, row, item.text)
    source = item.source.source
    late = isinstance(source, StoredFile) and source.fingerprint is not None
    image = open_image(item.source if late else Image(content, item.source.pixel_budget))
    return _Loaded(item, _sized(row, *image.size), image)


def _sized(row: IndexRow, width: int | None, height: int | None) -> IndexRow:
    return replace(row, width=width, height=height)


def _captioned(row: IndexRow, caption: str | None) -> IndexRow:
    if caption is None:
        return row
    return replace(row, extra={**row.extra, GENERATED_CAPTION: caption})


def _skipped(item: IndexItem, error: DataError) -> SkippedItem:
    return SkippedItem(item.location, str(error).removeprefix("image: "))
