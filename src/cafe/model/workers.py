"""Embeddings from several processes, each with the model on a device of its own.

Every process loads what the caller's model was loaded from and compares weights: a model that was
changed since (trained, say) is an error, not silently another embedding. Inputs are sent in shards
to whichever process is free. When a process dies its pipe closes, so nothing waits for it.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cafe.errors import CafeError, WorkerError
from cafe.model.inference import InferenceModel, encode, length_buckets
from cafe.types import Conversation

if TYPE_CHECKING:
    from jaxtyping import Float

    from cafe.model.rows.collate import Collator

_SHARDS_PER_WORKER = 4
"""So that no process waits long for the last one. Fewer and longer shards prefetch better."""

_MAX_BATCHES = 16
"""In a shard: results come back regularly, and messages stay small."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What a model was loaded from, so that another process can load it too.

    load   `CAFe.from_pretrained`; it must be picklable, as must its arguments below
    """

    load: Callable[..., InferenceModel]
    name_or_dir: str | Path
    attention: Any
    adapter: str | Path | None


@dataclass(frozen=True, slots=True)
class _Job:
    """What a process receives when it starts.

    digest    of the caller's weights
    threads   for torch in the process
    """

    source: ModelSource
    digest: str
    dtype: torch.dtype
    device: str
    threads: int
    collator: Collator
    batch_size: int
    prompt: str


@dataclass(frozen=True, slots=True)
class _Worker:
    device: str
    process: Any
    connection: Connection

    def died(self) -> WorkerError:
        self.process.join(10)
        return WorkerError(
            f"the process that encodes on {self.device} has ended (exit code "
            f"{self.process.exitcode}); its own message is above. If it ran out of memory: use a "
            "smaller batch_size or fewer devices. If it died before it began: call encode from a "
            'script under if __name__ == "__main__":'
        )

    def stop(self) -> None:
        """With its connection closed: an idle process ends on its own, a busy one is killed."""
        self.process.join(0.5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def weights_digest(model: nn.Module) -> str:
    """A fingerprint of the weights, from up to 64 values of each; training changes all weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        some = weight.detach().flatten()[:: max(1, weight.numel() // 64)]
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(some.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def encode_on(
    devices: Sequence[str | torch.device],
    model: InferenceModel,
    source: ModelSource | None,
    conversations: Sequence[Conversation],
    batch_size: int,
    prompt: str,
    on_progress: Callable[[int], None],
) -> Float[Tensor, "n hidden"]:
    """What `cafe.model.inference.encode` returns, computed by one process per device.

    Args:
        devices: one process is started for each.
        model: the caller's.
        source: what it was loaded from; None: it was built, which is an error here.
        conversations: the inputs.
        batch_size: inputs per forward.
        prompt: name of the embedding prompt.
        on_progress: called with the number of inputs that were embedded since the last call.

    Raises:
        WorkerError: the model was not loaded, or was changed since; or a process died.
        DataError: an input cannot be used; the message names it, as in one process.
    """
    if source is None:
        raise WorkerError(
            "several processes need a model that was loaded: use save_pretrained, then "
            "CAFe.from_pretrained"
        )
    embeddings = torch.zeros(len(conversations), model.embedding_dimension)
    shards = shards_of(length_buckets(conversations, batch_size), len(devices))
    names = [str(device) for device in devices[: len(shards)]]
    if not names:
        return embeddings
    job = _Job(
        source=source,
        digest=weights_digest(model.model),
        dtype=model.model.dtype,
        device="",
        threads=max(1, torch.get_num_threads() // len(names)),
        collator=model.collator,
        batch_size=batch_size,
        prompt=prompt,
    )
    workers: list[_Worker] = []
    try:
        for name in names:
            workers.append(_start(job, name))
        for numbers, vectors in _results(workers, shards, conversations):
            embeddings[numbers] = vectors
            on_progress(len(numbers))
    finally:
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.stop()
    return embeddings


def shards_of(batches: Sequence[Sequence[int]], workers: int) -> list[list[int]]:
    """What is sent to a process in one message: the indices of a few whole batches, in order."""
    size = min(_MAX_BATCHES, max(1, len(batches) // (workers * _SHARDS_PER_WORKER)))
    groups = [batches[i : i + size] for i in range(0, len(batches), size)]
    return [[i for batch in group for i in batch] for group in groups]


def _start(job: _Job, device: str) -> _Worker:
    context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA, nor torch's threads
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve, args=(theirs, replace(job, device=device)), daemon=True
    )
    process.start()
    theirs.close()  # otherwise this end would stay open when the process dies
    return _Worker(device, process, ours)


def _results(
    workers: Sequence[_Worker], shards: Sequence[list[int]], conversations: Sequence[Conversation]
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices and embeddings of every shard as they arrive; each worker has one at a time."""
    remaining = iter(shards)
    working: dict[Connection, tuple[_Worker, list[int]]] = {}

    def send_next(worker: _Worker) -> None:
        for shard in remaining:
            worker.connection.send((shard, [conversations[i] for i in shard]))
            working[worker.connection] = (worker, shard)
            break

    for worker in workers:
        try:
            send_next(worker)
        except OSError:
            raise worker.died() from None
    while working:
        for connection in wait(list(working)):
            worker, shard = working.pop(connection)  # type: ignore[index]
            try:
                result = worker.connection.recv()
                if isinstance(result, Exception):
                    raise result
                yield shard, torch.from_numpy(result)
                send_next(worker)
            except (EOFError, OSError):
                raise worker.died() from None


def _serve(connection: Connection, job: _Job) -> None:
    """The main loop of a process: receive a shard, send its embeddings or an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller handles Ctrl-C
    torch.set_num_threads(job.threads)
    model: InferenceModel | None = None
    while True:
        try:
            numbers, conversations = connection.recv()
        except (EOFError, OSError):  # the caller is done, or has died
            return
        try:
            model = model or _load(job)
            vectors = encode(model, conversations, job.batch_size, job.prompt, numbers=numbers)
            result: Any = vectors.numpy()
        except CafeError as error:
            result = error
        except Exception as error:  # not all of torch's exceptions can be pickled
            result = WorkerError(f"encoding on {job.device}: {type(error).__name__}: {error}")
        connection.send(result)


def _load(job: _Job) -> InferenceModel:
    source = job.source
    model = source.load(
        source.name_or_dir,
        dtype=job.dtype,
        device=job.device,
        attention=source.attention,
        adapter=source.adapter,
    )
    if weights_digest(model.model) != job.digest:
        raise WorkerError(
            f"model {str(source.name_or_dir)!r} was changed after it was loaded, and other "
            "processes would load the old one: use save_pretrained, then CAFe.from_pretrained"
        )
    model.collator = job.collator
    return model
