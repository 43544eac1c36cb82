"""Ctrl-C and SIGTERM become a request that the loop honours between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from cafe.errors import TrainingError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(TrainingError):
    """The run was asked to stop; its state is saved, and the message says how to go on.

    exit_code   128 + the signal's number, as shells have it: 130 for Ctrl-C, 143 for SIGTERM
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopRequest:
    """While it is entered, the first SIGINT or SIGTERM is only noted.

    A second Ctrl-C stops at once, as Ctrl-C does elsewhere. Outside the main thread, where Python
    takes no signals, nothing is ever noted.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number


def ignore_in_worker(_worker: int) -> None:
    """A signal to the whole process group is the training process's to answer."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
