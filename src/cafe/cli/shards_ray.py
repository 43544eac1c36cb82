"""`cafe embed --engine ray`: the shards of `cafe.cli.shards`, on Ray Data.

The driver reads the input once and puts each missing shard, undecoded, into Ray's object store,
which spills to disk. Workers, each with the model on a GPU of its own, take one after the other and
write it: a fast worker does more, and what a dead one had begun is done by another. All of them see
input, output and model under the same paths.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cafe.cli.embed import tell
from cafe.cli.inputs import Record, Skipped, Source
from cafe.cli.progress import progress_bar
from cafe.cli.shards import (
    Done,
    OpenSink,
    Ranks,
    Sink,
    embedded_blocks,
    inputs_in,
    parts_of,
    unique,
)
from cafe.errors import CafeError

if TYPE_CHECKING:
    from cafe.index import ModelFacts

ALONE = Ranks(rank=0, count=1, local=0)

ATTEMPTS = 3
"""Ray gives a node 30 seconds to start; a busy machine needs more, and the next try is quicker."""


def embed_with_ray(
    model: str, source: Path, inputs: Source, opened: OpenSink, shard_size: int, workers: int | None
) -> Done:
    """Write the shards that are not there, by `workers` processes.

    workers   None: one for each GPU of the cluster, or one
    Raises CafeError when Ray is not installed or cannot start, and what a worker raised.
    """
    with _cluster() as ray, _explained():
        size, share = shares(ray.cluster_resources(), workers)
        facts = ray.get(ray.remote(_facts).options(**share).remote(model))
        sink = opened(facts)
        done = Done(sink.where, ALONE)
        missing = done.missing(sink, inputs.count, shard_size)
        records = unique(inputs.records(), sink)
        parts = [ray.put(_packed(*part)) for part in parts_of(records, shard_size, missing)]
        with progress_bar("embed", inputs_in(missing, inputs.count, shard_size)) as bar:
            for row in _written(parts, (model, sink), size, share):
                problems = pickle.loads(row["problems"])
                tell(problems)
                done.shards += 1
                done.embedded += row["embedded"]
                done.skipped += len(problems)
                bar(done.embedded + done.skipped)
        sink.complete()
    return done.checked(source)


class Worker:
    """One process of the pool: a model, and where its shards go."""

    def __init__(self, model: str, sink: Sink) -> None:
        from cafe.model.vlm import CAFe

        self._vlm, self._sink = CAFe.from_pretrained(model), sink

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Embed and write one shard; says how many inputs there were and which were broken."""
        embedded = 0
        problems: list[Skipped] = []

        def told(count: int, broken: Sequence[Skipped]) -> None:
            nonlocal embedded
            embedded += count
            problems.extend(broken)

        records = pickle.loads(row["records"])
        self._sink.write(row["shard"], embedded_blocks(self._vlm, records, told))
        return {"embedded": embedded, "problems": pickle.dumps(problems)}


def shares(resources: Mapping[str, float], workers: int | None) -> tuple[int, dict[str, float]]:
    """How many workers, and what each of them gets: a GPU, or an equal part of the CPUs."""
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    size = workers or max(1, gpus)
    if gpus:
        return size, {"num_gpus": min(1.0, gpus / size)}
    return size, {"num_cpus": max(1, cpus // size)}


def _facts(model: str) -> ModelFacts:
    """On a worker: the driver may have no GPU."""
    from cafe.cli.index_model import open_model

    return open_model(model)[1]


def _packed(shard: int, records: list[Record | Skipped]) -> Any:
    """A shard as one row. Pickled: Arrow holds no text with half a surrogate pair."""
    import pyarrow as pa

    return pa.table({"shard": [shard], "records": [pickle.dumps(records)]})


def _written(
    parts: Sequence[Any], worker: tuple[str, Sink], size: int, share: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """What the workers say of each shard, as it is done."""
    if not parts:
        return
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    pool = ray.data.ActorPoolStrategy(size=min(size, len(parts)))
    rows = ray.data.from_arrow_refs(list(parts))
    each: Any = Worker  # Ray takes a class that is called, and its types do not say so
    done = rows.map(each, fn_constructor_args=worker, compute=pool, **share)
    yield from done.iter_rows()


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
