"""Vectors -> neighbours: an index is one LanceDB table, in a folder or an object store.

    index = Index.create("photos.index", facts)         # facts: which model made the vectors
    index.add(rows, vectors)                            # by id: what is there is replaced
    index.search(vector, top=10, where="width > 640")   # -> list[Hit]

`sync` keeps an index equal to a folder of pictures. Nothing here knows a model: what embeds comes
as a function. LanceDB itself is imported when a table is opened, so this package needs it only
then.
"""

from __future__ import annotations

from cafe.index.ann import GOAL, Approximate
from cafe.index.fingerprint import ModelFacts, model_facts
from cafe.index.rows import Kind, Origin, Row
from cafe.index.table import APPROXIMATE_ROWS, Index
from cafe.index.upkeep import Item, Report, Skipped, sync

__all__ = [
    "APPROXIMATE_ROWS",
    "GOAL",
    "Approximate",
    "Index",
    "Item",
    "Kind",
    "ModelFacts",
    "Origin",
    "Report",
    "Row",
    "Skipped",
    "model_facts",
    "sync",
]
