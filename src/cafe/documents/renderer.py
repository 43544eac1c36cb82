"""Processes that read PDFs (`cafe.documents.confined`), and what happens when one does not answer.

A process that takes too long is killed, and one that dies is replaced; both become one error about
one page. Only a few exist, they start when they are needed, and end with this process, also when
that is killed: their input ends then.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cafe.documents import confined
from cafe.errors import DataError

PAGE_SECONDS = 30
"""For one request; a dense map takes 2."""

WORKER_BYTES = 2**30
"""Address space of a process that reads PDFs; 150 MB are Python's and the library's own."""

MAX_WORKERS = 4

MAX_KILLS = 3
"""Pages of one document that may take too long or end their process; the others are not tried."""


class _Worker:
    """One process, which answers one request at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", confined.__file__, str(WORKER_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.answers = 0
        """Number of requests that it has answered: memory that those left may be what it lacks."""

    def ask(self, request: dict[str, Any], seconds: float) -> tuple[dict[str, Any], bytes]:
        """The answer. Raises `_NoAnswerError`, after which the process is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            answer = json.loads(line) if line.endswith(b"\n") else None
            count = 0 if answer is None else answer.get("bytes", 0)
            content = self._process.stdout.read(count) if count else b""
        except OSError:
            answer, count, content = None, 0, b""
        finally:
            timer.cancel()
        if answer is None or len(content) < count:
            self.close()
            raise _NoAnswerError(self._reason(late.is_set(), seconds), late.is_set())
        self.answers += 1
        return answer, content

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _reason(self, late: bool, seconds: float) -> str:
        code = self._process.returncode
        if late or code == -getattr(signal, "SIGXCPU", 0):
            return f"took more than {seconds:.0f} s, which is the limit"
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        return f"ended the process that read it ({how}): it is damaged, or needs too much memory"


class _NoAnswerError(Exception):
    """The process died, or was killed because it took too long (`late`); says which."""

    def __init__(self, reason: str, late: bool) -> None:
        super().__init__(reason)
        self.late = late


class _Pool:
    """A few processes, each used by one thread at a time."""

    def __init__(self) -> None:
        self._free = threading.Semaphore(min(MAX_WORKERS, os.cpu_count() or 1))
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._kills: Counter[tuple[str, int]] = Counter()

    def ask(self, path: Path, seconds: float, **request: Any) -> tuple[dict[str, Any], bytes]:
        key = _version(path)
        if self._kills[key] >= MAX_KILLS:
            raise DataError(f"not tried: {MAX_KILLS} pages of the document took too long, or worse")
        asked = {"path": str(path), "seconds": int(seconds) + 1, **request}
        with self._worker() as workers:
            try:
                answer, content = _asked_twice(workers, asked, seconds)
            except _NoAnswerError as error:
                workers.clear()
                with self._lock:
                    self._kills[key] += 1
                raise DataError(str(error)) from None
        if "error" in answer:
            raise DataError(answer["error"])
        return answer, content

    @contextlib.contextmanager
    def _worker(self) -> Iterator[list[_Worker]]:
        """A list of one process; what is still in it afterwards is used again."""
        with self._free:
            with self._lock:
                workers = [self._idle.pop()] if self._idle else []
            workers = workers or [_Worker()]
            try:
                yield workers
            except (DataError, _NoAnswerError):
                self._put_back(workers)
                raise
            except BaseException:  # an interrupt: an answer may be under way
                for worker in workers:
                    worker.close()
                raise
            else:
                self._put_back(workers)

    def _put_back(self, workers: list[_Worker]) -> None:
        with self._lock:
            self._idle += workers

    def close(self) -> None:
        with self._lock:
            workers, self._idle = self._idle, []
        for worker in workers:
            worker.close()


def _asked_twice(
    workers: list[_Worker], request: dict[str, Any], seconds: float
) -> tuple[dict[str, Any], bytes]:
    """The answer of the process, or of a fresh one where that died of what it had read before."""
    used = workers[0].answers > 0
    try:
        return workers[0].ask(request, seconds)
    except _NoAnswerError as error:
        if error.late or not used:
            raise
    workers[0] = _Worker()
    return workers[0].ask(request, seconds)


def _version(path: Path) -> tuple[str, int]:
    """A changed file is tried again."""
    try:
        return str(path), path.stat().st_mtime_ns
    except OSError:
        return str(path), 0


_pool = _Pool()


def _afresh() -> None:
    """A forked process has pools of its own: two could not read one pipe."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_afresh)
atexit.register(lambda: _pool.close())


# ---------------------------------------------------------------------- what can be asked


def count_pages(path: Path) -> int:
    """Raises DataError, without the file's name: it is no PDF, encrypted, or has no pages."""
    answer, _ = _pool.ask(path, PAGE_SECONDS)
    return int(answer["pages"])


def render_page(path: Path, number: int, pixels: int) -> bytes:
    """Page `number` (from 1) at most `pixels` large, as the bytes of a PPM file.

    Raises:
        DataError: without the file's name: the page cannot be read, is too large or took too long.
    """
    answer, content = _pool.ask(path, PAGE_SECONDS, page=number, pixels=pixels)
    return f"P6 {answer['width']} {answer['height']} 255\n".encode() + content


def page_text(path: Path, number: int) -> str:
    """The text that the file stores for page `number`. Raises DataError as `render_page` does."""
    answer, _ = _pool.ask(path, PAGE_SECONDS, page=number, text=True)
    return str(answer["text"])
