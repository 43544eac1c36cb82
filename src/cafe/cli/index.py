"""`cafe index`: a folder of images, or a data set, becomes an index that can be searched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cafe.cli.arguments import (
    CaptionOption,
    Model,
    ThinkOption,
    left_out_line,
    silent_note,
    skipped_lines,
)

if TYPE_CHECKING:
    from cafe.retrieval.indexing import IndexReport


def command(
    model: Model,
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER_OR_DATA",
            help="A folder of images and PDFs, a data file of images with captions, or a .jsonl of "
            '{"text": ...}.',
        ),
    ],
    to: Annotated[
        str,
        typer.Option("--to", metavar="DIR", help="The index: a folder, or an object store's URI."),
    ],
    caption: CaptionOption = False,
    think: ThinkOption = None,
    multi_vector: Annotated[
        bool,
        typer.Option("--multi-vector", help="Also store, and search by, a vector of every token."),
    ] = False,
    pool: Annotated[
        float | None,
        typer.Option(min=1, metavar="N", help="With --multi-vector: one vector for N tokens."),
    ] = None,
    page_pixels: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Size of a PDF page's image (1,000,000 pixels)."),
    ] = None,
    max_pages: Annotated[
        int, typer.Option(min=1, metavar="N", help="Documents with more pages are skipped.")
    ] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs embedded, then written.")] = 64,
) -> None:
    """Make or update an index for cafe search.

    What did not change since the last run is not embedded again; rows of what vanished are
    deleted. A run that was killed continues where it stopped. Broken files are listed on stderr,
    counted and skipped.
    """
    from cafe.retrieval.indexing import build_index

    with skipped_lines() as on_skipped:
        report = build_index(
            model,
            source,
            to,
            caption=caption or None,  # an index that has captions keeps them
            think=think,
            multi_vector=_vectors_for(multi_vector, pool),
            page_pixels=page_pixels,
            max_pages=max_pages,
            batch_size=batch_size,
            on_skipped=on_skipped,
            show_progress_bar=True,
        )
    print(_formatted(report))


def _vectors_for(multi_vector: bool, pool: float | None) -> float | None:
    """For how many tokens a vector is stored; None: as the index is."""
    if pool is not None and not multi_vector:
        raise typer.BadParameter(
            "is for token vectors; give --multi-vector, too", param_hint="--pool"
        )
    return (pool or 1.0) if multi_vector else None


def _formatted(report: IndexReport) -> str:
    """Counts, and how exact a search is."""
    from cafe.index import GOAL

    changes, approximate = report.changes, report.approximate
    counts = [
        f"{count:,} {name}"
        for name, count in (
            ("added", changes.added),
            ("changed", changes.changed),
            ("moved", changes.moved),
            ("unchanged", changes.unchanged),
            ("deleted", changes.deleted),
            ("skipped", len(changes.skipped)),
        )
        if count
    ]
    lines = [f"{report.uri}: {report.rows:,} rows ({', '.join(counts)})"]
    if changes.silent:
        lines.append(silent_note(changes.silent))
    if report.left_out:
        lines.append(left_out_line(report.left_out))
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
