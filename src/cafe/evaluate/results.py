"""Result files: one JSON per task, with what each score was computed from.

    {"task": "pope", "version": 1, "model": "tiny", "count": 3000,
     "scores": {"random/accuracy": 0.91, …}, "intervals": {"random/accuracy": [0.89, 0.93], …},
     "samples": "91b0…", "items": {"random/right": "6656…", …}, "ratios": {"random/accuracy":
     ["random/right", "random/asked"], …}, "means": {…}, "derived": null,
     "settings": {…}, "packages": {…}, "seed": 0, "details": {…}}

`samples` tells whether two results are about the same samples. Columns of small whole numbers are
strings of digits, one a sample.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import numpy as np

from cafe.errors import DataError
from cafe.evaluate.scoring import CONFIDENCE, RESAMPLES, Derivation, Ratio, score_intervals
from cafe.evaluate.task import Result

FORMAT = 1


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A result file, as far as comparisons need it; `record` is all of it."""

    record: dict[str, Any]
    items: dict[str, np.ndarray]
    ratios: dict[str, Ratio]
    means: dict[str, tuple[str, ...]]
    derived: Derivation | None

    @property
    def task(self) -> str:
        return str(self.record["task"])

    @property
    def model(self) -> str:
        return str(self.record.get("model", "?"))


def result_record(result: Result, *, seed: int = 0) -> dict[str, Any]:
    """The part of a result file that the task's result gives, ready for JSON."""
    intervals = score_intervals(result, seed=seed) if result.items else {}
    intervals |= result.intervals
    return {
        "count": result.count,
        "scores": result.scores,
        "intervals": {name: [i.low, i.high] for name, i in intervals.items()},
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": seed,
        "samples": blake2b("\n".join(result.ids).encode(), digest_size=8).hexdigest(),
        "items": {name: pack(column) for name, column in result.items.items()},
        "ratios": {name: [ratio.part, ratio.whole] for name, ratio in result.ratios.items()},
        "means": {name: list(parts) for name, parts in result.means.items()},
        "derived": result.derived,
        "details": result.details,
        "format": FORMAT,
    }


def read_result(path: Path) -> StoredResult:
    """Raises DataError when the file is missing or no result of `cafe evaluate`."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise DataError(
                f"{path}: written in format {record['format']}, this version reads {FORMAT}; "
                "evaluate again"
            )
        return StoredResult(
            record,
            {name: unpack(column) for name, column in record["items"].items()},
            {name: Ratio(*parts) for name, parts in record["ratios"].items()},
            {name: tuple(parts) for name, parts in record["means"].items()},
            cast("Derivation | None", record["derived"]),
        )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a result of `cafe evaluate` ({error!r})") from error


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """The file appears complete or not at all. Raises DataError when it cannot be written."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def pack(column: np.ndarray) -> str | list[Any]:
    """Whole numbers 0..9 as a string of digits (two axes: a list of strings), others as lists."""
    if column.dtype.kind in "iub" and column.size and column.min() >= 0 and column.max() <= 9:
        digits = (column.astype(np.uint8) + ord("0")).astype(np.uint8)
        rows = [row.tobytes().decode() for row in np.atleast_2d(digits)]
        return rows[0] if column.ndim == 1 else rows
    return column.tolist()


def unpack(value: str | list[Any]) -> np.ndarray:
    """What `pack` packed."""
    if isinstance(value, str):
        return np.frombuffer(value.encode(), dtype=np.uint8).astype(np.int64) - ord("0")
    if value and isinstance(value[0], str):
        return np.stack([unpack(row) for row in value])
    return np.array(value)
