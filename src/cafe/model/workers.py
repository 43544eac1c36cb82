"""Embeddings from several processes, each with the model on a device of its own.

Every process loads what the caller's model was loaded from, and says what it has: a model that was
changed since (trained, say) is an error and not another embedding. Inputs go out in pieces, to
whichever process is free. When a process dies its pipe closes, so nothing waits for it.
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
from cafe.model.inference import buckets, encode
from cafe.types import Conversation

if TYPE_CHECKING:
    from cafe.model.collate import Collator
    from cafe.model.vlm import CAFe

_PIECES_PER_WORKER = 4
"""So that none waits long for the last one; a piece of many batches is prepared ahead better."""

_MAX_BATCHES = 16
"""Of a piece: results come back now and then, and what is sent stays small."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a model was loaded from; the arguments of `CAFe.from_pretrained`."""

    name_or_dir: str | Path
    attention: Any
    adapter: str | Path | None


@dataclass(frozen=True, slots=True)
class _Job:
    """All that a process is told at its start.

    digest    of the caller's weights
    threads   of the process, for torch
    """

    source: Source
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
            f"{self.process.exitcode}); its own message is above. Out of memory: use a smaller "
            "batch_size or fewer devices. Before it began: call encode from a script under "
            'if __name__ == "__main__":'
        )

    def stop(self) -> None:
        """Once its connection is closed: an idle one ends by itself, a busy one is killed."""
        self.process.join(0.5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def weights_digest(model: nn.Module) -> str:
    """Tells weights apart by some values of each; training changes all of them."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        some = weight.detach().flatten()[:: max(1, weight.numel() // 64)]
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(some.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def encode_on(
    devices: Sequence[str | torch.device],
    model: CAFe,
    conversations: Sequence[Conversation],
    batch_size: int,
    prompt: str,
    done: Callable[[int], None],
) -> Tensor:
    """What `cafe.model.inference.encode` gives, computed by a process for each of `devices`.

    done   is told how many more inputs are embedded
    Raises WorkerError when the model was not loaded or was changed since, and when a process dies;
    DataError, naming the input, as in one process.
    """
    if model.source is None:
        raise WorkerError(
            "several processes need a model that was loaded: use save_pretrained, then "
            "CAFe.from_pretrained"
        )
    embeddings = torch.zeros(len(conversations), model.embedding_dimension)
    pieces = _pieces(buckets(conversations, batch_size), len(devices))
    names = [str(device) for device in devices[: len(pieces)]]
    if not names:
        return embeddings
    job = _Job(
        source=model.source,
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
        for numbers, vectors in _answers(workers, pieces, conversations):
            embeddings[numbers] = vectors
            done(len(numbers))
    finally:
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.stop()
    return embeddings


def _pieces(batches: Sequence[Sequence[int]], workers: int) -> list[list[int]]:
    """Whole batches one after the other, some of them together: what goes out at once."""
    size = min(_MAX_BATCHES, max(1, len(batches) // (workers * _PIECES_PER_WORKER)))
    groups = [batches[i : i + size] for i in range(0, len(batches), size)]
    return [[i for batch in group for i in batch] for group in groups]


def _start(job: _Job, device: str) -> _Worker:
    context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA, nor torch's threads
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve, args=(theirs, replace(job, device=device)), daemon=True
    )
    process.start()
    theirs.close()  # or its end would stay open when the process dies
    return _Worker(device, process, ours)


def _answers(
    workers: Sequence[_Worker], pieces: Sequence[list[int]], conversations: Sequence[Conversation]
) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers and embeddings of every piece, as they come; one piece at a time for each worker."""
    left = iter(pieces)
    working: dict[Connection, tuple[_Worker, list[int]]] = {}

    def give(worker: _Worker) -> None:
        for piece in left:
            worker.connection.send((piece, [conversations[i] for i in piece]))
            working[worker.connection] = (worker, piece)
            break

    for worker in workers:
        try:
            give(worker)
        except OSError:
            raise worker.died() from None
    while working:
        for connection in wait(list(working)):
            worker, piece = working.pop(connection)  # type: ignore[index]
            try:
                answer = worker.connection.recv()
                if isinstance(answer, Exception):
                    raise answer
                yield piece, torch.from_numpy(answer)
                give(worker)
            except (EOFError, OSError):
                raise worker.died() from None


def _serve(connection: Connection, job: _Job) -> None:
    """The life of a worker: a piece in, its embeddings or what went wrong out, until the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    torch.set_num_threads(job.threads)
    model: CAFe | None = None
    while True:
        try:
            numbers, conversations = connection.recv()
        except (EOFError, OSError):  # the caller needs no more, or is gone
            return
        try:
            model = model or _load(job)
            vectors = encode(model, conversations, job.batch_size, job.prompt, numbers=numbers)
            answer: Any = vectors.numpy()
        except CafeError as error:
            answer = error
        except Exception as error:  # not all of torch's can be sent
            answer = WorkerError(f"encoding on {job.device}: {type(error).__name__}: {error}")
        connection.send(answer)


def _load(job: _Job) -> CAFe:
    from cafe.model.vlm import CAFe

    source = job.source
    model = CAFe.from_pretrained(
        source.name_or_dir,
        dtype=job.dtype,
        device=job.device,
        attention=source.attention,
        adapter=source.adapter,
    )
    if weights_digest(model.model) != job.digest:
        raise WorkerError(
            f"model {str(source.name_or_dir)!r} was changed after it was loaded, and the other "
            "processes would load the old one: use save_pretrained, then CAFe.from_pretrained"
        )
    model.collator = job.collator
    return model
