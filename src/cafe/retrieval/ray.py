"""`cafe embed --engine ray`: the shards of `cafe.retrieval.shards`, on Ray Data.

The driver reads the input once and puts each missing shard, undecoded, into Ray's object store,
which spills to disk. Workers, each with the model on a GPU of its own, take one after the other and
write it: a fast worker does more, and what a dead one had begun is done by another. Input, output
and model must have the same paths on all machines.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cafe.errors import CafeError
from cafe.progress import progress_bar
from cafe.retrieval.blocks import BlockLimits, embedded_blocks
from cafe.retrieval.indexing import open_model
from cafe.retrieval.own_words import OwnWords
from cafe.retrieval.shards import (
    EmbedReport,
    OpenSink,
    Tally,
    count_shard,
    inputs_in,
    missing_shards,
    split,
    unique,
)
from cafe.retrieval.sinks import Sink
from cafe.retrieval.sources import Entry, RecordSource, SkippedRecord

if TYPE_CHECKING:
    from cafe.index import ModelFacts

ATTEMPTS = 3
"""Ray gives a node 30 seconds to start; a busy machine needs more, and the next try is quicker."""


def embed_with_ray(
    model: str,
    source: RecordSource,
    open_sink: OpenSink,
    shard_size: int,
    workers: int | None,
    *,
    words: OwnWords,
    batch_size: int,
    limits: BlockLimits,
    on_skipped: Callable[[str], None],
    show_progress_bar: bool = False,
) -> EmbedReport:
    """Write the shards that are not there, by a pool of processes.

    Args:
        model: What each worker loads.
        source: What to embed.
        open_sink: Opens where the shards go, once the model's facts are known.
        shard_size: Number of inputs of a shard; the last one may have fewer.
        workers: Number of processes; None: one for each GPU of the cluster, or one.
        words: How images are embedded with what the model says of them.
        batch_size: Inputs that a worker embeds together.
        limits: How much a worker decodes together.
        on_skipped: Called with one line for each input that is skipped.
        show_progress_bar: Draw one on stderr.

    Raises:
        CafeError: Ray is not installed or cannot start; and what a worker raised.
    """
    with _cluster() as ray, _explained():
        size, share = shares(ray.cluster_resources(), workers)
        facts = ray.get(ray.remote(_facts).options(**share).remote(model))
        sink = open_sink(words.facts(facts))
        report = EmbedReport(uri=sink.uri, shards=0)
        missing = missing_shards(report, sink, source.count, shard_size)
        records = unique(source.records(), sink)
        parts = [ray.put(_packed(*part)) for part in split(records, shard_size, missing)]
        total = inputs_in(missing, source.count, shard_size)
        with progress_bar("embed", total, show=show_progress_bar) as bar:
            tally = Tally(report, on_skipped, bar.to)
            for row in _written(parts, (model, sink, words, batch_size, limits), size, share):
                count_shard(report, sink, row["shard"])
                tally.add(row["embedded"], pickle.loads(row["skipped"]), row["silent"])
        sink.complete()
    report.paths.sort()
    report.check_any(source)
    return report


class Worker:
    """One process of the pool: a model, and where its shards go."""

    def __init__(
        self, model: str, sink: Sink, words: OwnWords, batch_size: int, limits: BlockLimits
    ) -> None:
        from cafe.model.vlm import CAFe

        vlm = CAFe.from_pretrained(model)
        self._sink, self._limits = sink, limits
        self._encode, self._write_captions = words.functions(vlm, batch_size)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Embed and write one shard; returns the number of embeddings and what was skipped."""
        embedded = silent = 0
        skipped: list[SkippedRecord] = []

        def on_block(count: int, broken: Sequence[SkippedRecord], wordless: int) -> None:
            nonlocal embedded, silent
            embedded += count
            silent += wordless
            skipped.extend(broken)

        records = pickle.loads(row["records"])
        shard = int(row["shard"])
        blocks = embedded_blocks(
            self._encode, records, on_block, self._limits, self._write_captions
        )
        self._sink.write(shard, blocks)
        return {
            "shard": shard,
            "embedded": embedded,
            "skipped": pickle.dumps(skipped),
            "silent": silent,
        }


def shares(resources: Mapping[str, float], workers: int | None) -> tuple[int, dict[str, float]]:
    """The number of workers, and what each of them gets: a GPU, or an equal part of the CPUs."""
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    size = workers or max(1, gpus)
    if gpus:
        return size, {"num_gpus": min(1.0, gpus / size)}
    return size, {"num_cpus": max(1, cpus // size)}


def _facts(model: str) -> ModelFacts:
    """On a worker: the driver may have no GPU."""
    return open_model(model)[1]


def _packed(shard: int, records: list[Entry]) -> Any:
    """A shard as one row. Pickled: Arrow holds no text with half a surrogate pair."""
    import pyarrow as pa

    return pa.table({"shard": [shard], "records": [pickle.dumps(records)]})


def _written(
    parts: Sequence[Any],
    worker: tuple[Any, ...],
    size: int,
    share: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """The results of the workers, shard by shard, as they finish."""
    if not parts:
        return
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    pool = ray.data.ActorPoolStrategy(size=min(size, len(parts)))
    rows = ray.data.from_arrow_refs(list(parts))
    each: Any = Worker  # Ray takes a class that is called, and its types do not say so
    results = rows.map(each, fn_constructor_args=worker, compute=pool, **share)
    yield from results.iter_rows()


@contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, on the cluster that RAY_ADDRESS names, or else started here, on loopback only."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise CafeError("--engine ray needs Ray: pip install 'cafe-vlm[ray]'") from error
    here: dict[str, Any] = {
        "address": "local",
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
    }
    address = os.environ.get("RAY_ADDRESS", "local")
    where: dict[str, Any] = here if address == "local" else {"address": address}
    for left in reversed(range(ATTEMPTS)):
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **where)
            break
        except Exception as error:  # of many kinds, among them bare ones
            ray.shutdown()
            if not left:
                raise CafeError(
                    f"Ray cannot be started or reached at {address} ({_line(error)})"
                ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _explained() -> Iterator[None]:
    """What a worker raised is raised here, without Ray's wrapping."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        cause: BaseException | None = error
        # Ray's own wrapping of a CafeError is an instance of both.
        while isinstance(cause, RayError) or not isinstance(cause, CafeError | None):
            cause = getattr(cause, "cause", None) or cause.__cause__
        raise cause or CafeError(f"a Ray worker failed ({_line(error)})") from error


def _line(error: BaseException) -> str:
    """The last line of what Ray says: the others are a traceback."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
