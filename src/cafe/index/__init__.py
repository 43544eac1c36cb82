"""Vectors -> neighbours: an index is one LanceDB table, in a folder or an object store.

    index = Index.create("photos.index", facts)         # facts: which model makes the vectors
    index.add(rows, vectors)                            # by id: existing rows are replaced
    index.search(vector, top=10, where="width > 640")   # -> list[Hit]

`cafe.retrieval.indexing.model_facts(model)` gives the facts. `sync` keeps an index equal to a
folder of images. Nothing here knows a model: an `encode` function is an argument. LanceDB itself
is imported when a table is opened, so this package needs it only then.
"""

from __future__ import annotations

from cafe.index.ann import GOAL, Approximate
from cafe.index.fingerprint import ModelFacts
from cafe.index.rows import GENERATED_CAPTION, ContentKind, IndexRow, Origin
from cafe.index.table import APPROXIMATE_ROWS, Index
from cafe.index.upkeep import IndexItem, Report, SkippedItem, WriteCaptions, sync

__all__ = [
    "APPROXIMATE_ROWS",
    "GENERATED_CAPTION",
    "GOAL",
    "Approximate",
    "ContentKind",
    "Index",
    "IndexItem",
    "IndexRow",
    "ModelFacts",
    "Origin",
    "Report",
    "SkippedItem",
    "WriteCaptions",
    "sync",
]
