"""`cafe embed`: texts, images, or both together become embeddings in Parquet or LanceDB."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
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
    from cafe.retrieval.shards import EmbedReport


class EngineOption(StrEnum):
    """What runs the shards."""

    local = "local"
    ray = "ray"


def command(
    model: Model,
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A .txt file (one text per line), a .jsonl file of "
            '{"text": ..., "image": path relative to the file}, a folder of images, or a data set '
            "that cafe train reads.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.parquet", help="Where to write; a folder with --shard-size."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="DIR", help="Write a LanceDB table there, for cafe search."),
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option(min=1, help="Inputs per file. Finished files are not made again."),
    ] = None,
    engine: Annotated[
        EngineOption,
        typer.Option(help="ray: shards on Ray Data, on the cluster at RAY_ADDRESS or here."),
    ] = EngineOption.local,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of --engine ray (default: one per GPU, else one)."),
    ] = None,
    caption: CaptionOption = False,
    think: ThinkOption = None,
) -> None:
    """Write embeddings of texts and images.

    Broken inputs are listed on stderr, counted, and skipped. Under torchrun each process embeds its
    share of the files, on its own GPU.
    """
    from cafe.errors import DataError
    from cafe.retrieval.embed import embed_dataset

    if (out is None) == (to is None):
        raise DataError("name where to write: --out FILE.parquet, or --to DIR for a LanceDB table")
    if workers is not None and engine is EngineOption.local:
        raise DataError("--workers is for --engine ray; without it, use torchrun")
    with skipped_lines() as on_skipped:
        report = embed_dataset(
            model,
            source,
            out,
            to=to,
            shard_size=shard_size,
            engine=engine.value,
            workers=workers,
            caption=caption,
            think=think or 0,
            on_skipped=on_skipped,
            show_progress_bar=True,
        )
    print(_formatted(report))


def _formatted(report: EmbedReport) -> str:
    """Counts, in one line, and what of a folder was left out in another."""
    rank = f"rank {report.rank.index}: " if report.rank.size > 1 else ""
    shards = "" if report.shards is None else f"{report.shards} shards of "
    parts = [f"{rank}{report.embedded} embeddings in {shards}{report.uri}"]
    if report.shards_present:
        parts.append(f"{report.shards_present} shards were there")
    if report.silent:
        parts.append(silent_note(report.silent))
    if report.skipped:
        parts.append(f"{len(report.skipped)} inputs skipped")
    line = ", ".join(parts)
    return f"{line}\n{left_out_line(report.left_out)}" if report.left_out else line
