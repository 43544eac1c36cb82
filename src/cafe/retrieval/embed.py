"""The job of `cafe embed`: texts, images, or both together become embeddings.

They go to one Parquet file, to a folder of shards, to a LanceDB table, or back to the caller.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from cafe.data.quarantine import log_skipped
from cafe.errors import DataError
from cafe.files import replacing
from cafe.index import WriteCaptions
from cafe.progress import progress_bar
from cafe.ranks import Rank
from cafe.retrieval.blocks import (
    BLOCK_LIMITS,
    Block,
    BlockLimits,
    EncodeInputs,
    embedded_blocks,
)
from cafe.retrieval.indexing import open_model
from cafe.retrieval.own_words import OwnWords
from cafe.retrieval.shards import (
    EmbedReport,
    OpenSink,
    Tally,
    columns_of,
    embed_shards,
    open_files,
    open_table,
)
from cafe.retrieval.sinks import EmbeddingTable
from cafe.retrieval.sources import RecordSource, open_source

if TYPE_CHECKING:
    from cafe.model.vlm import CAFe

logger = logging.getLogger(__name__)

EmbedEngine = Literal["local", "ray"]

TABLE_SHARD_SIZE = 8192
"""Inputs of one write into a LanceDB table where no shard size is set; they are kept in memory
until then."""


def embed_dataset(
    model: CAFe | str | Path,
    source: str | Path,
    out: str | Path | None = None,
    *,
    to: str | Path | None = None,
    shard_size: int | None = None,
    engine: EmbedEngine = "local",
    workers: int | None = None,
    caption: bool = False,
    think: int = 0,
    batch_size: int = 32,
    limits: BlockLimits = BLOCK_LIMITS,
    encode: EncodeInputs | None = None,
    load: Callable[[str], CAFe] | None = None,
    on_skipped: Callable[[str], None] | None = None,
    show_progress_bar: bool = False,
) -> EmbedReport:
    """Embed every record of a source. Broken records are skipped and reported, never fatal.

    Under torchrun each process embeds its share of the shards, on its own GPU.

    Args:
        model: A loaded model, or what `CAFe.from_pretrained` takes.
        source: A text file, a JSON Lines file, a folder of images, or a data set that
            `cafe train` reads (`cafe.retrieval.sources`).
        out: A Parquet file to write, or, with `shard_size`, a folder of them.
        to: A LanceDB table to write, for `cafe search`. With neither `out` nor `to`, the
            embeddings are returned.
        shard_size: Number of inputs of a shard. Shards that are there are not made again.
        engine: "ray" writes the shards on Ray Data, on the cluster at RAY_ADDRESS or here.
        workers: Number of processes of Ray; None: one per GPU, else one.
        caption: Embed each image without text together with a caption that the model writes of it
            (`CAFe.encode`); Parquet files and tables keep it in the column `generated_caption`.
        think: Read it after what the model says, in at most this many tokens, which is kept there.
        batch_size: Inputs of one forward pass.
        limits: How much is decoded and embedded together.
        encode: Embeds inputs (strings, PIL images in RGB, or {"text", "image"}) as float32 [n, d],
            in place of the model's `encode`, with its keywords caption and think. Not with Ray.
        load: Loads the model by its name, in place of `CAFe.from_pretrained`. Not with Ray.
        on_skipped: Called with a line for each input that is skipped; None: the line is logged.
        show_progress_bar: Draw one, on stderr.

    Returns:
        The number of embeddings, the skipped records with location and reason, and the files that
        were written, or `ids` and `embeddings` float32 [embedded, d].

    Raises:
        DataError: There is nothing to embed, the source cannot be read, the destination cannot be
            written or holds the shards of another run, or the options contradict each other.
        CheckpointError: The model cannot be loaded.
        CafeError: Ray is not installed, or a worker failed.

    Example:
        >>> Path("notes.txt").read_text().splitlines()
        ['a red mug', '', 'a blue mug']
        >>> report = embed_dataset("tiny", "notes.txt")
        >>> report.ids, report.embeddings.shape
        (['1', '3'], (2, 256))
        >>> report.skipped
        [SkippedRecord(location='notes.txt, line 2', reason='an empty line')]
        >>> embed_dataset("tiny", "notes.txt", "notes.parquet").paths
        [PosixPath('notes.parquet')]
    """
    job = _Job(
        model, out, to, shard_size, engine, workers, OwnWords(caption, think), batch_size, limits,
        encode, load, on_skipped or log_skipped, show_progress_bar,
    )  # fmt: skip
    job.check()
    return job.run(open_source(source))


@dataclass(frozen=True, slots=True)
class _Job:
    """The arguments of `embed_dataset`."""

    model: CAFe | str | Path
    out: str | Path | None
    to: str | Path | None
    shard_size: int | None
    engine: EmbedEngine
    workers: int | None
    words: OwnWords
    batch_size: int
    limits: BlockLimits
    encode: EncodeInputs | None
    load: Callable[[str], CAFe] | None
    on_skipped: Callable[[str], None]
    show_progress_bar: bool
    rank: Rank = field(default_factory=Rank.from_environment)

    @property
    def in_shards(self) -> bool:
        return self.to is not None or (self.out is not None and self.shard_size is not None)

    def check(self) -> None:
        """Raises DataError for options that contradict each other."""
        if self.out is not None and self.to is not None:
            raise DataError("out and to: name one of them")
        if self.shard_size is not None and not self.in_shards:
            raise DataError("shard_size: name where to write, as out or to")
        if self.engine == "ray":
            if self.rank.size > 1:
                raise DataError("engine ray starts its own processes; run it without torchrun")
            if not self.in_shards:
                raise DataError("engine ray writes in shards; set a shard size, or write a table")
            if not isinstance(self.model, str | Path) or self.encode or self.load:
                raise DataError(
                    "engine ray: each worker loads the model by its name; pass that, without "
                    "encode or load"
                )
        if self.out is None:
            return
        if self.in_shards:
            if Path(self.out).suffix == ".parquet" or Path(self.out).is_file():
                raise DataError(f"{self.out}: shards are several files; name a folder")
        elif self.rank.size > 1:
            raise DataError(
                f"{self.out}: {self.rank.size} processes cannot write one file; set a shard size"
            )

    def run(self, source: RecordSource) -> EmbedReport:
        report = self._embedded(source)
        report.left_out = source.left_out
        report.silent = report.silent if self.words else 0
        return report

    def _embedded(self, source: RecordSource) -> EmbedReport:
        if not self.in_shards:
            return self._in_memory(source) if self.out is None else self._in_file(source, self.out)
        size = self.shard_size or TABLE_SHARD_SIZE
        open_sink = self._sink(source, size)
        if self.engine == "ray":
            from cafe.retrieval.ray import embed_with_ray

            return embed_with_ray(
                str(self.model),
                source,
                open_sink,
                size,
                self.workers,
                words=self.words,
                batch_size=self.batch_size,
                limits=self.limits,
                on_skipped=self.on_skipped,
                show_progress_bar=self.show_progress_bar,
            )
        model, facts = open_model(self.model, device=self.rank.device, load=self.load)
        encode, write_captions = self.words.functions(model, self.batch_size, self.encode)
        return embed_shards(
            encode,
            source,
            open_sink(self.words.facts(facts)),
            size,
            self.rank,
            on_skipped=self.on_skipped,
            show_progress_bar=self.show_progress_bar,
            limits=self.limits,
            write_captions=write_captions,
        )

    def _sink(self, source: RecordSource, size: int) -> OpenSink:
        if self.to is not None:
            return partial(open_table, source, str(self.to), size)
        return partial(open_files, _name(self.model), source, Path(self.out or ""), size)

    def _in_file(self, source: RecordSource, out: str | Path) -> EmbedReport:
        report = EmbedReport(uri=str(out), paths=[Path(out)])
        with replacing(Path(out)) as unfinished:  # before the model: a wrong path fails immediately
            functions = self._functions()
            columns = columns_of(source, bool(self.words))
            with EmbeddingTable(unfinished, columns, _name(self.model)) as table:
                for rows, embeddings in self._blocks(*functions, source, report):
                    table.append(rows, embeddings)
            report.check_any(source)
        return report

    def _in_memory(self, source: RecordSource) -> EmbedReport:
        report = EmbedReport()
        parts: list[np.ndarray] = []
        for rows, embeddings in self._blocks(*self._functions(), source, report):
            report.ids += [row.id for row in rows]
            parts += [] if embeddings is None else [embeddings]
        report.check_any(source)
        report.embeddings = np.concatenate(parts)
        return report

    def _functions(self) -> tuple[EncodeInputs, WriteCaptions | None]:
        """What embeds and what writes captions; the model is loaded only if it does one of them."""
        if self.encode is not None and not self.words:
            return self.encode, None
        model, load = self.model, self.load
        if isinstance(model, str | Path):
            if load is None:
                from cafe.model.vlm import CAFe

                load = CAFe.from_pretrained
            model = load(str(model))
        return self.words.functions(model, self.batch_size, self.encode)

    def _blocks(
        self,
        encode: EncodeInputs,
        write_captions: WriteCaptions | None,
        source: RecordSource,
        report: EmbedReport,
    ) -> Iterator[Block]:
        with progress_bar("embed", source.count, show=self.show_progress_bar) as bar:
            tally = Tally(report, self.on_skipped, bar.to)
            yield from embedded_blocks(
                encode, source.records(), tally.add, self.limits, write_captions
            )


def _name(model: CAFe | str | Path) -> str:
    """The name that Parquet files keep; empty for a model that was built in memory."""
    if isinstance(model, str | Path):
        return str(model)
    source = model.source
    return "" if source is None else str(source.adapter or source.name_or_dir)
