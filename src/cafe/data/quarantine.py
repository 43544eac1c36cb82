"""Records that cannot be used: counted and written to a file; too many of them end the run.

Each line of the quarantine file is one record:

    {"source": "captions.json", "record": "line 7", "reason": "turn 2: the answer is empty"}
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cafe.errors import DataError, shortened

logger = logging.getLogger(__name__)

MIN_REJECTED = 10
"""A share says little about three records: below this number, a share is never exceeded."""

NO_SUCH_FILE = ": no such file in "
"""Between the name and the folder in the reason of a record whose image or video is missing."""

_SHOWN = 3
_LONGEST = 2000  # characters of a reason, whatever is quoted in it


@dataclass(frozen=True, slots=True)
class Skipped:
    """One record that is skipped.

    source  the file (or stream) that contains it
    record  its location there: "line 7", "record 7, id 'cat-7'", or the id of an example
    reason  what is wrong, and the fix
    """

    source: str
    record: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "record", shortened(self.record, _LONGEST))
        object.__setattr__(self, "reason", shortened(self.reason, _LONGEST))

    def __str__(self) -> str:
        return f"{self.source}, {self.record}: {self.reason}"


def add_skipped(skipped: list[str], report: Callable[[str], None], line: str) -> None:
    """Keep one line about something that is left out, and report it."""
    skipped.append(line)
    report(line)


def log_skipped(line: str) -> None:
    """The default report of something that is left out."""
    logger.warning("skipped %s", line)


def summarized(skipped: Sequence[Skipped]) -> list[str]:
    """A line for each skipped record, but one for all whose files are missing if these are many.

    Thousands of missing files have one cause, and one remedy.
    """
    missing = [item for item in skipped if NO_SUCH_FILE in item.reason]
    if len(missing) <= _SHOWN:
        return [str(item) for item in skipped]
    names = [item.reason.partition(NO_SUCH_FILE)[0] for item in missing[:_SHOWN]]
    folder, _, fix = missing[0].reason.partition(NO_SUCH_FILE)[2].partition("; ")
    line = f"{len(missing):,} of them name files that are not in {folder}: {', '.join(names)}, …"
    others = [str(item) for item in skipped if NO_SUCH_FILE not in item.reason]
    return [f"{line}; {fix}" if fix else line, *others]


@dataclass(slots=True)
class Quarantine:
    """Collects skipped records; may be used by several threads.

    path       JSONL file that they are appended to; None: they are only counted
    threshold  a float: the largest share of all records seen that may be skipped (checked from
               `MIN_REJECTED` on); an int: the largest number
    seen       number of records seen so far

    A record is written and counted once, however many epochs repeat it. A resumed run appends to
    the file of the first one.
    """

    path: Path | None = None
    threshold: float | int = 0.05
    seen: int = field(default=0, init=False)
    _reasons: dict[tuple[str, str], Skipped] = field(default_factory=dict, init=False)
    _lock: threading.Lock = field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )

    @property
    def count(self) -> int:
        """Number of different records that were skipped."""
        return len(self._reasons)

    @property
    def skipped(self) -> list[Skipped]:
        """The skipped records, in the order in which they were added."""
        return list(self._reasons.values())

    def add(self, skipped: Sequence[Skipped], seen: int) -> None:
        """Add records that were skipped.

        Args:
            skipped: The skipped ones among the next `seen` records.
            seen: Number of records that were read.

        Raises:
            DataError: After writing, when the threshold is exceeded; or the file cannot be
                written.
        """
        with self._lock:
            self.seen += seen
            new: dict[tuple[str, str], Skipped] = {}
            for item in skipped:
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

    def _write(self, skipped: Sequence[Skipped]) -> None:
        if self.path is None or not skipped:
            return
        lines = "".join(json.dumps(asdict(item)) + "\n" for item in skipped)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise DataError(
                f"{self.path}: skipped records cannot be written ({error.strerror}); "
                f"the first is {skipped[0]}"
            ) from error

    def _complaint(self) -> str:
        allowed = (
            f"{self.threshold} are allowed"
            if isinstance(self.threshold, int)
            else f"{self.threshold:.1%} are allowed"
        )
        first = "; ".join(summarized(self.skipped)[:_SHOWN])
        more = "" if self.path is None else f"; all of them are in {self.path}"
        return (
            f"{self.count} of {self.seen} records cannot be used, and {allowed}; fix the data. "
            f"The first: {first}{more}"
        )
