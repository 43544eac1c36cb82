"""Embeddings of millions of inputs: in shards, each written whole or not at all.

    OUT/shards.json     model, input, number of inputs, shard size: what a resumed run must agree on
    OUT/00000.parquet   inputs 0 to shard size - 1, without the broken ones
    OUT/00001.parquet   …

A shard that is there is done. Under torchrun rank r of w makes the shards r, r + w, r + 2w, …;
ranks do not communicate, so one that dies stops no other. In a LanceDB table a shard is one write,
and its rows name it in the column "shard".
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cafe.errors import DataError
from cafe.files import write_json
from cafe.index import GENERATED_CAPTION, Index, ModelFacts, Origin, WriteCaptions
from cafe.progress import progress_bar
from cafe.ranks import Rank
from cafe.retrieval.blocks import BLOCK_LIMITS, BlockLimits, EncodeInputs, embedded_blocks
from cafe.retrieval.sinks import FileSink, Sink, TableSink
from cafe.retrieval.sources import Entry, RecordSource, SkippedRecord

PLAN = "shards.json"

OpenSink = Callable[[ModelFacts], Sink]
"""A model's facts -> a sink that agrees with them. Raises DataError when it holds other shards."""


@dataclass(slots=True)
class EmbedReport:
    """What a run embedded, and where it is.

    embedded        number of inputs that were embedded
    skipped         inputs that could not be, with location and reason
    uri             the file, folder or table that was written; None: only this report
    shards          number of shards that this process wrote; None: not in shards
    shards_present  number of this process's shards that were there before
    paths           Parquet files that this process wrote
    ids             of the embeddings; only where nothing is written
    embeddings      float32 [embedded, d], in the order of `ids`; only where nothing is written
    rank            which process of how many this is
    left_out        files of a folder that are no images, by kind -> number of them
    silent          number of images that were embedded alone, because the model says nothing of
                    them; 0 where it is not asked
    """

    embedded: int = 0
    skipped: list[SkippedRecord] = field(default_factory=list)
    uri: str | None = None
    shards: int | None = None
    shards_present: int = 0
    paths: list[Path] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    embeddings: np.ndarray | None = None
    rank: Rank = field(default_factory=Rank)
    left_out: Counter[str] = field(default_factory=Counter)
    silent: int = 0

    @property
    def done(self) -> int:
        """Number of inputs that were embedded or skipped."""
        return self.embedded + len(self.skipped)

    def check_any(self, source: RecordSource) -> None:
        """Raises DataError when there was nothing to embed in all of `source`."""
        if self.rank.size == 1 and not self.embedded and not self.shards_present:
            raise DataError(f"{source.name}: nothing to embed ({len(self.skipped)} inputs skipped)")


@dataclass(slots=True)
class Tally:
    """Adds up a run's report, block by block or shard by shard.

    on_skipped   called with one line for each input that is skipped
    on_progress  called with the number of inputs that are done
    """

    report: EmbedReport
    on_skipped: Callable[[str], None]
    on_progress: Callable[[int], None]

    def add(self, embedded: int, skipped: Sequence[SkippedRecord], silent: int) -> None:
        self.report.embedded += embedded
        self.report.silent += silent
        self.report.skipped += skipped
        for record in skipped:
            self.on_skipped(f"{record.location}: {record.reason}")
        self.on_progress(self.report.done)


def open_files(
    model: str, source: RecordSource, out: Path, shard_size: int, facts: ModelFacts
) -> FileSink:
    """The folder `out`, with its plan. Raises DataError when that is of another run."""
    _agree(out, _plan(facts, source, shard_size))
    return FileSink(out, columns_of(source, facts.generates), model, facts.dimension)


def columns_of(source: RecordSource, generates: bool) -> tuple[str, ...]:
    """Columns of a Parquet file, besides the id and the embedding."""
    return (*source.columns, GENERATED_CAPTION) if generates else source.columns


def open_table(source: RecordSource, to: str, shard_size: int, facts: ModelFacts) -> TableSink:
    """The table at `to`, new or of the same run. Raises DataError when it is of another one."""
    plan = _plan(facts, source, shard_size)
    index = Index.find(to)
    if index is None:
        root = None if source.root is None else str(source.root.resolve())
        columns = {"shard": pa.int32()}
        columns |= {GENERATED_CAPTION: pa.string()} if facts.generates else {}
        origin = Origin(json.dumps(plan, sort_keys=True), root, "embed")
        try:
            Index.create(to, facts, origin=origin, columns=columns)
            return TableSink(to, source.root)
        except DataError:  # another rank was quicker
            index = Index.open(to)
    index.check_model(facts)
    before = index.origin
    if before is None or before.made_by != "embed":
        raise DataError(f"index {to} was not written by cafe embed; write to another place")
    _same(f"index {to}", json.loads(before.source), plan)
    return TableSink(to, source.root)


def embed_shards(
    encode: EncodeInputs,
    source: RecordSource,
    sink: Sink,
    shard_size: int,
    rank: Rank,
    *,
    on_skipped: Callable[[str], None],
    show_progress_bar: bool = False,
    limits: BlockLimits = BLOCK_LIMITS,
    write_captions: WriteCaptions | None = None,
) -> EmbedReport:
    """Write the shards that are this process's and not there; the input is read once, in order.

    Args:
        encode: Embeds a block of inputs.
        source: What to embed.
        sink: Where the shards go.
        shard_size: Number of inputs of a shard; the last one may have fewer.
        rank: Which shards are this process's.
        on_skipped: Called with one line for each input that is skipped.
        show_progress_bar: Draw one on stderr, on the first process.
        limits: How much is decoded and embedded together.
        write_captions: Writes captions of images, which `encode` then gets; None: it gets none.

    Raises:
        DataError: There is nothing to embed, or a shard cannot be written.
    """
    report = EmbedReport(uri=sink.uri, shards=0, rank=rank)
    missing = missing_shards(report, sink, source.count, shard_size)
    total = inputs_in(missing, source.count, shard_size)
    with progress_bar("embed", total, show=show_progress_bar and rank.index == 0) as bar:
        tally = Tally(report, on_skipped, bar.to)
        for shard, records in split(unique(source.records(), sink), shard_size, missing):
            blocks = embedded_blocks(encode, records, tally.add, limits, write_captions)
            sink.write(shard, blocks)
            count_shard(report, sink, shard)
    if rank.size == 1:
        sink.complete()
    report.check_any(source)
    return report


# ---------------------------------------------------------------------- shards


def missing_shards(report: EmbedReport, sink: Sink, count: int, shard_size: int) -> set[int]:
    """Shards of `count` inputs that are this process's and missing; `report` counts the others."""
    own = {s for s in range(-(-count // shard_size)) if report.rank.owns(s)}
    present = own & sink.finished()
    report.shards_present = len(present)
    return own - present


def count_shard(report: EmbedReport, sink: Sink, shard: int) -> None:
    """Note in the report that a shard was written."""
    report.shards = (report.shards or 0) + 1
    path = sink.path(shard)
    report.paths += [] if path is None else [path]


def inputs_in(shards: Iterable[int], count: int, shard_size: int) -> int:
    """Number of inputs in these shards, out of `count` in all."""
    return sum(min(shard_size, count - shard * shard_size) for shard in shards)


def split(
    records: Iterable[Entry], size: int, wanted: set[int]
) -> Iterator[tuple[int, list[Entry]]]:
    """The wanted shards, undecoded; the others are read past."""
    part: list[Entry] = []
    number = 0
    for number, record in enumerate(records):
        shard = number // size
        if shard in wanted:
            part.append(record)
        if part and (number + 1) % size == 0:
            yield shard, part
            part = []
    if part:
        yield number // size, part


def unique(records: Iterable[Entry], sink: Sink) -> Iterator[Entry]:
    """The records; where ids must be unique, a repeated one is broken."""
    if not sink.unique_ids:
        yield from records
        return
    seen: set[int] = set()
    for record in records:
        if isinstance(record, SkippedRecord):
            yield record
            continue
        digest = hashlib.blake2b(record.id.encode("utf-8", "surrogatepass"), digest_size=8)
        key = int.from_bytes(digest.digest(), "little")
        again = key in seen
        seen.add(key)
        yield SkippedRecord(record.location, f"id {record.id!r} comes twice") if again else record


# ---------------------------------------------------------------------- plan


def _plan(facts: ModelFacts, source: RecordSource, shard_size: int) -> dict[str, Any]:
    model = {name: value for name, value in facts.as_dict().items() if name != "name"}
    return {
        "model": model,
        "input": source.origin,
        "inputs": source.count,
        "shard_size": shard_size,
    }


def _agree(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or compare with the one that is there."""
    path = out / PLAN
    if not path.is_file():
        if out.is_dir() and any(out.glob("*.parquet")):
            raise DataError(f"{out}: holds other Parquet files; name a new folder")
        write_json(path, plan, indent=2)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); name a new folder") from error
    _same(str(out), before, plan)


def _same(uri: str, before: dict[str, Any], plan: dict[str, Any]) -> None:
    different = [name for name in plan if before.get(name) != plan[name]]
    if different:
        name = different[0]
        raise DataError(
            f"{uri}: holds shards made with another {name.replace('_', ' ')} "
            f"({before.get(name)}, now {plan[name]}); run it as before, or write to another place"
        )
