"""What each rank of the distributed test does; a module of its own, so that spawn can import it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cafe.ranks import process_group


def worker(number: int, port: int, out: str) -> None:
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    own: list[Any] = []

    def tens(values: Sequence[int]) -> list[int]:
        own.append(list(values))
        return [10 * value for value in values]

    def shout(values: Sequence[str]) -> list[str]:
        own.append(list(values))
        return [f"{value}!" for value in values]

    def fail(values: Sequence[int]) -> list[int]:
        if 1 in values:
            raise ValueError("rank 1 has no memory")
        return list(values)

    with process_group() as rank:
        result = [rank.share(range(5), tens), rank.share(["a", "b", "c"], shout)]
        try:
            rank.share([0, 1, 2], fail)
            error = ""
        except ValueError as found:
            error = str(found)
    record = {"result": result, "own": own, "error": error}
    (Path(out) / f"{number}.json").write_text(json.dumps(record))
