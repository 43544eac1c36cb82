"""`/search` over a `cafe.index`: its hits, and nothing about where it lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cafe.errors import DataError
from cafe.index import Index
from cafe.serve.refusal import Refused
from cafe.types import Hit


class IndexSearch:
    """An `Index` as a server asks it (`cafe.serve.service.Search`)."""

    def __init__(self, index: Index) -> None:
        self._index = index

    @property
    def root(self) -> Path | None:
        """Where the paths of its pictures start; None: they are no files of one folder."""
        origin = self._index.origin
        return None if origin is None or origin.root is None else Path(origin.root)

    def __call__(self, vector: np.ndarray, top: int, where: str | None) -> list[Hit]:
        """Raises Refused (400) for SQL that cannot be used; RuntimeError for a broken index."""
        if where is not None:
            try:
                self._index.count(where)
            except DataError as error:
                raise Refused.invalid(str(error).removeprefix("--"), "where") from error
        try:
            return self._index.search(vector, top, where)
        except DataError as error:  # its message names the folder, which is nobody's business
            raise RuntimeError("the index cannot be searched") from error
