"""A file of groups: which examples of a source belong into the same batch.

One line for each group, a JSON list of the ids of its examples:

    ["000003", "000017", "000120", "000042"]

`cafe mine --batches` writes it, and `data.*.groups` of a recipe names it. Examples that no line
names are drawn at random among themselves; ids that no example has mean nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from cafe.data.records import numbered_lines
from cafe.errors import DataError, quoted
from cafe.types import Example


def group_line(ids: Sequence[str]) -> str:
    """One line of the file, with its newline."""
    return json.dumps(list(ids), ensure_ascii=False) + "\n"


def read_groups(path: Path) -> dict[str, int]:
    """The number of the group of each id.

    Raises:
        DataError: the file cannot be read, or a line is no list of ids, or names one that is in a
            group already; names the line.
    """
    groups: dict[str, int] = {}
    for number, line in numbered_lines(path):
        location = f"{path}, line {number}"
        try:
            ids = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{location}: is not JSON ({error}); write it with cafe mine"
            ) from error
        if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
            raise DataError(f'{location}: expected a list of ids, as ["12", "40", "7"]')
        for one in ids:
            if one in groups:
                raise DataError(f"{location}: the id {quoted(one)} is in a group already")
            groups[one] = number - 1
    return groups


def digest_of(groups: Mapping[str, int]) -> str:
    """Equal for equal groups."""
    return hashlib.blake2b(json.dumps(groups).encode(), digest_size=16).hexdigest()


def check_distinct_ids(examples: Iterable[Example], name: str) -> None:
    """Raises DataError where several examples have the same id."""
    counts = Counter(example.id for example in examples)
    if counts and (most := counts.most_common(1)[0])[1] > 1:
        raise DataError(
            f"{name}: {most[1]} examples have the id {most[0]!r}, so a group cannot name them; "
            "give each record an id of its own"
        )


def check_groups(examples: Sequence[Example], groups: Mapping[str, int], path: Path) -> None:
    """Check that groups are of these examples.

    Raises:
        DataError: several examples have the same id, or no line names any of them.
    """
    check_distinct_ids(examples, str(path))
    if not any(example.id in groups for example in examples):
        raise DataError(
            f"data.*.groups: {path}: names none of the {len(examples)} examples; write it for "
            "these data: cafe mine MODEL DATA --batches N"
        )


def group_numbers(examples: Sequence[Example], groups: Mapping[str, int]) -> np.ndarray | None:
    """int64 [n]: equal for examples of a group, and for all that are in none; None without any."""
    if not groups:
        return None
    numbers = [groups.get(example.id, -1) for example in examples]
    return np.unique(numbers, return_inverse=True)[1].astype(np.int64)
