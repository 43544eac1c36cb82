"""`cafe index`: a folder of pictures, or a data set, becomes an index that can be searched."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cafe.cli.arguments import Model

if TYPE_CHECKING:
    import numpy as np

    from cafe.index import Approximate, Index, Item, Origin, Report
    from cafe.model.vlm import CAFe

ASKED = 100
"""So many captions are asked as queries to measure an approximate index."""


def command(
    model: Model,
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER_OR_DATA",
            help="A folder of pictures, a data file of pictures with captions, or a .jsonl of "
            '{"text": ...}.',
        ),
    ],
    to: Annotated[
        str,
        typer.Option("--to", metavar="DIR", help="The index: a folder, or an object store's URI."),
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs embedded, then written.")] = 64,
) -> None:
    """Make or update an index for cafe search.

    What did not change since the last run is not embedded again; rows of what vanished are
    deleted. A run that was killed goes on where it was. Broken files are listed on stderr, counted
    and skipped.
    """
    from cafe.cli.index_items import list_items
    from cafe.cli.index_model import open_model
    from cafe.cli.progress import progress_bar
    from cafe.index import Index, Origin, sync

    listing = list_items(source)  # before torch: a wrong path is told at once
    origin = Origin(listing.source, None if listing.root is None else str(listing.root))
    index = Index.find(to)
    if index is not None:
        _check_origin(index, origin)
    vlm, facts = open_model(model, index)
    if index is None:
        index = Index.create(to, facts, origin=origin)

    def encode(values: Sequence[Any]) -> np.ndarray:
        return vlm.encode(values, batch_size=batch_size)

    with progress_bar("index", len(listing.items)) as done:
        report = sync(index, listing.items, encode, batch_size=batch_size, progress=done)
    index.set_origin(origin)
    report.skipped[:0] = listing.rejected
    for problem in report.skipped:
        print(f"skipped {problem.place}: {problem.reason}", file=sys.stderr)
    approximate = index.optimize(queries=_captions(vlm, listing.items, len(index)))
    print(_told(index, report, approximate))


def _check_origin(index: Index, origin: Origin) -> None:
    """Raises DataError where the index is of something else that still is there."""
    from cafe.errors import DataError

    before = index.origin
    if before is None or before == origin:
        return
    if before.made_by == "embed":
        raise DataError(
            f"index {index.uri} was written by cafe embed; index {origin.source} into another one"
        )
    if before.source != origin.source and Path(before.source).exists():
        raise DataError(
            f"index {index.uri} is of {before.source}, whose rows would be deleted; index "
            f"{origin.source} into another one"
        )


def _captions(vlm: CAFe, items: list[Item], rows: int) -> np.ndarray | None:
    """Embeddings of some captions: what people will ask of pictures is text, and lies elsewhere."""
    from cafe.index import APPROXIMATE_ROWS

    captions = [item.text for item in items if item.source is not None and item.text]
    if rows < APPROXIMATE_ROWS or len(captions) < ASKED:
        return None
    step = len(captions) // ASKED
    return vlm.encode([text.split("\n")[0] for text in captions[::step][:ASKED]])


def _told(index: Index, report: Report, approximate: Approximate | None) -> str:
    from cafe.index import GOAL

    counts = [
        f"{count:,} {name}"
        for name, count in (
            ("added", report.added),
            ("changed", report.changed),
            ("moved", report.moved),
            ("unchanged", report.unchanged),
            ("deleted", report.deleted),
            ("skipped", len(report.skipped)),
        )
        if count
    ]
    lines = [f"{index.uri}: {len(index):,} rows ({', '.join(counts)})"]
    if approximate is None:
        lines.append("search is exact")
    else:
        lines.append(
            f"search is approximate: recall@10 {approximate.recall:.3f} against exact search, "
            f"measured on {approximate.queries} queries ({approximate.probes} of "
            f"{approximate.partitions} partitions, refine {approximate.refine})"
        )
        if approximate.recall < GOAL:
            lines.append(f"that is below {GOAL}, and no setting reaches it")
    return "\n".join(lines)
