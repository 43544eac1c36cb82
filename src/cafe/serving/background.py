"""A server in a process of its own, for scripts, notebooks and tests.

`cafe.serve` blocks and needs the main thread. Here it has that of a new process. The caller waits
for the process as well as for its messages, so a server that dies while it starts is an error at
once.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cafe.errors import CafeError
from cafe.serving.run import serve

log = logging.getLogger(__name__)


class ServerProcess:
    """A running server; leaving its `with` block stops it.

    url        the address that it listens on
    """

    def __init__(self, process: Any, url: str) -> None:
        self._process = process
        self.url = url

    @property
    def exitcode(self) -> int | None:
        """Of the process: None while it runs, 0 after `stop`."""
        return self._process.exitcode

    def stop(self) -> None:
        """Finish the running requests, then end the process. Does nothing when it has ended."""
        self._process.terminate()
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def start_server(
    model: str | Path, *, report: Callable[[str], None] = log.info, **options: Any
) -> ServerProcess:
    """Start `cafe.serve` in a process of its own, and wait until the model is loaded.

    The new process imports the script that starts it, so a script calls this below
    `if __name__ == "__main__":`. A notebook needs no such line.

    Args:
        model: As for `cafe.serve`.
        report: As for `cafe.serve`; called in this process.
        options: The other arguments of `cafe.serve`. `port=0` takes a free port.

    Raises:
        CafeError: What `cafe.serve` raises, or the process ended before it was ready.

    Example:
        >>> with start_server("tiny", port=0) as server:
        ...     print(server.url)
        http://127.0.0.1:43121
    """
    context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA, nor torch's threads
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, model, options), daemon=True)
    process.start()
    theirs.close()  # otherwise this end would stay open when the process dies
    try:
        with ours:
            return ServerProcess(process, _address(ours, process, report))
    except BaseException:
        process.kill()
        process.join()
        raise


def _address(messages: Connection, process: Any, report: Callable[[str], None]) -> str:
    """The address, from the second line that the server reports."""
    lines: list[str] = []
    while len(lines) < 2:
        try:
            message = (
                messages.recv()
            )  # ends with the process, whose end of the pipe is the only one
        except (EOFError, OSError):
            process.join()
            raise CafeError(
                f"the server's process ended before it was ready (exit code {process.exitcode}); "
                "its own message is above. If that is about a line of this script: the process "
                "imports the script, so put what the script does under "
                'if __name__ == "__main__":'
            ) from None
        if isinstance(message, CafeError):
            raise message
        lines.append(message)
        report(message)
    return lines[1].rpartition(" on ")[2]


def _run(messages: Connection, model: str | Path, options: dict[str, Any]) -> None:
    """The process: serve, and send what the server reports, or why it cannot."""
    try:
        serve(model, report=messages.send, **options)
    except CafeError as error:
        try:
            messages.send(error)
        except OSError:  # it was ready, and nobody listens any more
            raise error from None
        raise SystemExit(error.exit_code) from None
