"""A mixture of files in LLaVA-NeXT's YAML.

    datasets:
      - json_path: /data/sharegpt4o.json
        sampling_strategy: "first:1000"     # first:N, end:N, random:N, all; N may be a share: 10%
      - json_path: coco.jsonl

Paths are absolute or relative to the YAML. `random` is the same choice in every run. Format:
https://github.com/LLaVA-VL/LLaVA-NeXT, scripts/train/*.yaml.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cafe.errors import DataError, quoted

_STRATEGY = re.compile(r"all|(?P<which>first|end|random):(?P<count>\d+(?:\.\d+)?)(?P<share>%)?")


@dataclass(frozen=True, slots=True)
class Portion:
    """A file of the mixture, and which of its records are used."""

    path: Path
    strategy: str


def is_mixture(path: Path) -> bool:
    return path.suffix.lower() in {".yaml", ".yml"}


def read_mixture(path: Path) -> list[Portion]:
    """The files that a mixture names. Raises DataError naming the entry that is not valid."""
    try:
        tree = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    entries = tree.get("datasets") if isinstance(tree, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: a mixture lists its files under datasets: [{{json_path: …}}]")
    return [_portion(path, number, entry) for number, entry in enumerate(entries, 1)]


def _portion(mixture: Path, number: int, entry: Any) -> Portion:
    place = f"{mixture}, entry {number}"
    if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
        raise DataError(f"{place}: json_path is missing; name a file of records")
    strategy = entry.get("sampling_strategy", "all")
    if not isinstance(strategy, str) or not _STRATEGY.fullmatch(strategy):
        raise DataError(
            f"{place}: sampling_strategy is {quoted(strategy)}, expected all, first:N, end:N or "
            "random:N, where N is a number or a share such as 10%"
        )
    return Portion(mixture.parent / Path(entry["json_path"]).expanduser(), strategy)


def chosen(strategy: str, count: int, seed: int) -> range | list[int]:
    """Which of `count` records a strategy uses, in their order in the file."""
    match = _STRATEGY.fullmatch(strategy)
    assert match is not None
    if match["which"] is None:
        return range(count)
    number = float(match["count"])
    wanted = min(count, math.ceil(number * count / 100) if match["share"] else int(number))
    match match["which"]:
        case "first":
            return range(wanted)
        case "end":
            return range(count - wanted, count)
        case _:
            return sorted(np.random.default_rng(seed).permutation(count)[:wanted].tolist())
