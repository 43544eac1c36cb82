"""How a run ends before its last step: a signal asks it to stop, or an unforeseen error ends it.

Ctrl-C and SIGTERM become a request that the loop honors between two steps.

When a data worker is killed, memory runs out or a library fails, the state before the step is still
intact, because only the optimizer's own step changes it. That state is saved, and the error names
the likely cause and the command that resumes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Self

import torch

from cafe.errors import CafeError, TrainingError
from cafe.training.checkpoints import Checkpoints, complete
from cafe.training.distributed import lost_contact, world_size
from cafe.training.state import TrainingState, random_state, set_random_state

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_SHOWN = 200  # characters of another library's error


# ---------------------------------------------------------------------- signals


class Interrupted(TrainingError):
    """The run was asked to stop; its state is saved, and the message says how to resume.

    exit_code   128 + the signal's number, as in shells: 130 for Ctrl-C, 143 for SIGTERM
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopRequest:
    """A context in which the first SIGINT or SIGTERM is only recorded, in `signal_number`.

    A second Ctrl-C raises KeyboardInterrupt immediately, as usual. Outside the main thread, where
    Python handles no signals, nothing is recorded.
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


def ignore_signals_in_worker(_worker: int) -> None:
    """Let only the training process react to a signal that the whole process group receives."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------------- unforeseen errors


@dataclass(slots=True)
class EmergencyCheckpoint:
    """Saves the state of a run when an unforeseen error ends it.

    done         number of steps that `state` includes
    total        number of steps of the whole run
    resume_with  the command that resumes this run
    consistent   whether `state` is that after `done` steps, not partly updated by the next one
    """

    checkpoints: Checkpoints
    state: TrainingState
    done: int
    total: int
    resume_with: str
    consistent: bool = field(default=True, init=False)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The context of the update of the state, which completes a step."""
        self.consistent = False
        yield
        self.consistent = True
        self.done += 1

    @contextmanager
    def saved_on_error(self, what: str | None = None) -> Iterator[None]:
        """The context of a step, or of something else: an unforeseen error saves the state.

        Raises:
            TrainingError: In place of any error but a CafeError or a lost connection.
        """
        before, streams = self.done, random_state(self.state.device)
        try:
            yield
        except CafeError:
            raise
        except Exception as error:
            if lost_contact(error):
                raise
            if self.consistent and self.done == before:  # the resumed run repeats the same draws
                set_random_state(streams, self.state.device)
            raise TrainingError(
                f"stopped in {what or f'step {before + 1} of {self.total}'} by {_one_line(error)}. "
                f"{likely_cause(error)}. {self._saved()}. Resume with: {self.resume_with}"
            ) from error

    def _saved(self) -> str:
        """Save the state if possible; returns a sentence about what there is to resume from."""
        steps = [step for step, _ in complete(self.checkpoints.folder)]
        # Saving is a collective of all processes, and only this one has the error.
        if self.consistent and self.done > max(steps, default=0) and world_size() == 1:
            try:
                self.checkpoints.save(self.state, self.done)
            except (TrainingError, MemoryError) as error:
                return f"The state could not be saved ({_one_line(error)})"
            steps = [self.done]
        if not steps:
            return "There is no checkpoint yet, so this starts from the beginning"
        return f"The state after step {max(steps)} is saved in {self.checkpoints.folder}"


def likely_cause(error: BaseException) -> str:
    """One sentence on what usually causes an error of torch or Python, and what helps."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text.lower():
        return (
            "Likely cause: the batch does not fit in the device's memory; lower batch.chunk, or "
            "set gradient_checkpointing: true"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "Likely cause: the machine's memory is full; lower batch.workers or batch.chunk"
    if "shared memory" in text or "Bus error" in text or "No space left on device" in text:
        return "Likely cause: /dev/shm or the disk is full; enlarge it, or set batch.workers: 0"
    if "data worker ended" in text:
        return (
            "Likely cause: the system killed a data worker because memory (or /dev/shm) was full; "
            "lower batch.workers, or set it to 0"
        )
    return "Likely cause: not known; CAFE_DEBUG=1 shows the traceback"


def _one_line(error: BaseException) -> str:
    """The error's type and text; for one that a data worker passed on, those of the original."""
    lines: list[Any] = str(error).strip().splitlines() or [""]
    passed_on = lines[0].startswith("Caught ")  # a traceback follows
    text = lines[-1] if passed_on else f"{type(error).__name__}: {lines[0]}"
    return text.strip()[:_SHOWN]
