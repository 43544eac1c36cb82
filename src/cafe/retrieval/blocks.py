"""Records become embeddings, a memory's worth at a time; broken ones are reported, never fatal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from cafe.batching import encode_each_captioned
from cafe.errors import DataError
from cafe.index import WriteCaptions
from cafe.media import open_image
from cafe.retrieval.sources import Entry, SkippedRecord, SourceRecord
from cafe.types import Image

EncodeInputs = Callable[..., Iterable[Any]]
"""Inputs, as `CAFe.encode` takes them -> float32 [n, d]. A DataError refuses them all. Captions, if
there are any, are the keyword `caption`, as in `CAFe.encode`. One that writes them itself returns n
`cafe.batching.WithCaption`."""


@dataclass(frozen=True, slots=True)
class BlockLimits:
    """When a block is full.

    inputs   enough for the model to sort a block by length, few enough to see progress
    pixels   decoded images of a block take at most three bytes times this, plus one image
    """

    inputs: int = 4096
    pixels: int = 200_000_000


BLOCK_LIMITS = BlockLimits()


@dataclass(frozen=True, slots=True)
class LoadedRecord:
    """A record whose image is decoded.

    value              what the model's `encode` takes
    generated_caption  what the model wrote of the image, if it was asked to
    """

    location: str
    id: str
    text: str | None
    path: Path | None
    value: Any
    generated_caption: str | None = None

    @property
    def image(self) -> PIL.Image.Image | None:
        image = self.value["image"] if isinstance(self.value, dict) else self.value
        return image if isinstance(image, PIL.Image.Image) else None

    @property
    def silent(self) -> bool:
        """Whether it is an image without any words: its own, or those that the model writes."""
        return self.text is None and self.image is not None and self.generated_caption is None


Block = tuple[list[LoadedRecord], np.ndarray | None]
"""Rows and their embeddings float32 [rows, d]; None where there are none."""

OnBlock = Callable[[int, Sequence[SkippedRecord], int], None]
"""Gets the number of embeddings of a block, the records that were skipped, and how many of the
embeddings are `LoadedRecord.silent`."""


def embedded_blocks(
    encode: EncodeInputs,
    records: Iterable[Entry],
    on_block: OnBlock,
    limits: BlockLimits = BLOCK_LIMITS,
    write_captions: WriteCaptions | None = None,
) -> Iterator[Block]:
    """Records with their embeddings, block by block, in order.

    Args:
        encode: Embeds a block.
        records: What to load and embed.
        on_block: Called when a block has been used.
        limits: When a block is full.
        write_captions: Writes captions of images, which `encode` then gets; None: it gets none.
    """
    for block, skipped in loaded_blocks(records, limits):
        rows, embeddings, refused = encode_block(encode, block, write_captions)
        yield rows, embeddings
        on_block(len(rows), [*skipped, *refused], sum(row.silent for row in rows))


def loaded_blocks(
    records: Iterable[Entry], limits: BlockLimits = BLOCK_LIMITS
) -> Iterator[tuple[list[LoadedRecord], list[SkippedRecord]]]:
    """Loaded records and broken ones, block by block, in order."""
    block: list[LoadedRecord] = []
    skipped: list[SkippedRecord] = []
    pixels = 0
    for record in records:
        loaded = record if isinstance(record, SkippedRecord) else _load(record)
        if isinstance(loaded, SkippedRecord):
            skipped.append(loaded)
        else:
            block.append(loaded)
            pixels += loaded.image.width * loaded.image.height if loaded.image else 0
        if len(block) + len(skipped) >= limits.inputs or pixels >= limits.pixels:
            yield block, skipped
            block, skipped, pixels = [], [], 0
    if block or skipped:
        yield block, skipped


def encode_block(
    encode: EncodeInputs,
    block: list[LoadedRecord],
    write_captions: WriteCaptions | None = None,
) -> tuple[list[LoadedRecord], np.ndarray | None, list[SkippedRecord]]:
    """Embed a block; where the model refuses it, find the broken inputs and skip only those."""
    embeddings, failures = encode_each_captioned(
        encode, [row.value for row in block], write_captions
    )
    kept = [i for i in range(len(block)) if i not in failures]
    skipped = [
        SkippedRecord(block[i].location, str(error)) for i, error in sorted(failures.items())
    ]
    stacked = np.stack([embeddings[i][0] for i in kept]) if kept else None
    rows = [replace(block[i], generated_caption=embeddings[i][1]) for i in kept]
    return rows, stacked, skipped


def _load(record: SourceRecord) -> LoadedRecord | SkippedRecord:
    try:
        f"{record.id}{record.text or ''}{record.path or ''}".encode()
    except UnicodeEncodeError:  # of JSON's escapes, or of a file name's bytes
        return SkippedRecord(record.location, "text contains an unpaired surrogate")
    value: Any = record.text
    source = record.image if record.path is None else Image(record.path)
    if source is not None:
        try:
            image = open_image(source)
        except DataError as error:
            # In a folder the location is the image: its name once is enough.
            reason = str(error).removeprefix(f"image {record.location!r}: ")
            return SkippedRecord(record.location, reason)
        value = image if record.text is None else {"text": record.text, "image": image}
    return LoadedRecord(record.location, record.id, record.text, record.path, value)
