"""Records that cannot be used: told, counted and written down; too many of them end the run.

Each line of the quarantine file is one record:

    {"source": "captions.json", "record": "line 7", "reason": "turn 2: the answer is empty"}
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cafe.errors import DataError

MIN_REJECTED = 10
"""A share says nothing about three records: below so many, a share is never exceeded."""

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Rejected:
    """One record that is left out.

    source  the file (or stream) that it is from
    record  which one: "line 7", "record 7, id 'cat-7'", or the id of an example
    reason  what is wrong, and the mend
    """

    source: str
    record: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}, {self.record}: {self.reason}"


@dataclass(slots=True)
class Quarantine:
    """Collects rejected records; may be used by several threads.

    path       JSONL file that they are appended to; None: they are only counted
    threshold  a float: the largest share of all records seen that may be rejected (once
               `MIN_REJECTED` are); an int: the largest number

    A record is written and counted once, however many epochs bring it back. `path` grows: a
    resumed run adds to what the first one wrote.
    """

    path: Path | None = None
    threshold: float | int = 0.05
    seen: int = field(default=0, init=False)
    _reasons: dict[tuple[str, str], Rejected] = field(default_factory=dict, init=False)
    _lock: threading.Lock = field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )

    @property
    def count(self) -> int:
        """How many different records were rejected."""
        return len(self._reasons)

    @property
    def rejected(self) -> list[Rejected]:
        """The rejected records, in the order in which they came."""
        return list(self._reasons.values())

    def add(self, rejected: Sequence[Rejected], seen: int) -> None:
        """Take note of `rejected`, all of them among the next `seen` records.

        Raises DataError, after writing, when the threshold is exceeded or the file cannot be
        written.
        """
        with self._lock:
            self.seen += seen
            new: dict[tuple[str, str], Rejected] = {}
            for item in rejected:
                key = (item.source, item.record)
                if key not in self._reasons:
                    new.setdefault(key, item)
            self._reasons.update(new)
            self._write(list(new.values()))
            if new and self._exceeded():
                raise DataError(self._complaint())

    def _exceeded(self) -> bool:
        if isinstance(self.threshold, int):
            return self.count > self.threshold
        return self.count >= MIN_REJECTED and self.count > self.threshold * self.seen

    def _write(self, rejected: Sequence[Rejected]) -> None:
        if self.path is None or not rejected:
            return
        lines = "".join(json.dumps(asdict(item)) + "\n" for item in rejected)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise DataError(
                f"{self.path}: rejected records cannot be written ({error.strerror}); "
                f"the first is {rejected[0]}"
            ) from error

    def _complaint(self) -> str:
        allowed = (
            f"{self.threshold} are allowed"
            if isinstance(self.threshold, int)
            else f"{self.threshold:.1%} are allowed"
        )
        first = "; ".join(str(item) for item in self.rejected[:_SHOWN])
        more = "" if self.path is None else f"; all of them are in {self.path}"
        return (
            f"{self.count} of {self.seen} records cannot be used, and {allowed}; mend the data. "
            f"The first: {first}{more}"
        )
