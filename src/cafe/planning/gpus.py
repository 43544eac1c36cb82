"""The memory of graphics processors, by name: data with sources, in gpus.json beside this file.

Memory is that of the makers' datasheets, in units of 10^9 bytes. What a process can use of it is
less: the driver's context and the allocator's fragments take part of it.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cafe.errors import RecipeError

_TABLE = Path(__file__).with_name("gpus.json")


@dataclass(frozen=True, slots=True)
class GPU:
    """One kind of processor.

    name        lower case, words joined by hyphens: "h100", "a100-80"
    memory_gb   10^9 bytes
    source      where the number is from
    """

    name: str
    memory_gb: float
    source: str

    @property
    def memory_bytes(self) -> int:
        return round(1e9 * self.memory_gb)


@cache
def known_gpus() -> dict[str, GPU]:
    """Name -> its numbers, in the order of the names."""
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    return {name: GPU(name, **numbers) for name, numbers in sorted(table.items())}


def find_gpu(name: str) -> GPU:
    """The processor of that name, in capitals or not.

    >>> find_gpu("H100").memory_gb
    80

    Raises:
        RecipeError: it is not in the table; the message has the nearest names.
    """
    known = known_gpus()
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
    nearest = f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(known)}"
    raise RecipeError(f"gpu {name!r}: not in the table; {nearest}")
