"""`cafe embed`: texts, pictures, or both together become embeddings in Parquet or LanceDB."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cafe.cli.arguments import Model

if TYPE_CHECKING:
    import numpy as np

    from cafe.cli.inputs import Loaded, Skipped, Source
    from cafe.model.vlm import CAFe

TABLE_SHARD = 8192
"""Inputs of one write into a LanceDB table, if --shard-size does not say; they are kept in memory
until then."""


def command(
    model: Model,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="A .txt file (one text a line), a .jsonl file of "
            '{"text": ..., "image": path relative to the file}, or a folder of pictures.',
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
) -> None:
    """Write embeddings of texts and pictures.

    Broken inputs are listed on stderr, counted, and skipped. Under torchrun each process embeds its
    share of the files, on its own GPU.
    """
    from cafe.cli.inputs import open_source
    from cafe.cli.shards import Ranks, embed_to_files, embed_to_table
    from cafe.errors import DataError

    if (out is None) == (to is None):
        raise DataError("name where to write: --out FILE.parquet, or --to DIR for a LanceDB table")
    ranks = Ranks.here()
    inputs = open_source(source)  # before torch: a wrong path is told at once
    if to is not None:
        print(embed_to_table(model, source, inputs, to, shard_size or TABLE_SHARD, ranks))
    elif out is not None and shard_size is not None:
        print(embed_to_files(model, source, inputs, out, shard_size, ranks))
    elif out is not None:
        if ranks.count > 1:
            raise DataError(f"{out}: {ranks.count} processes cannot write one file; --shard-size")
        print(_embed_to_one(model, source, inputs, out))


def _embed_to_one(model: str, source: Path, inputs: Source, out: Path) -> str:
    from cafe.cli.files import replacing
    from cafe.cli.progress import progress_bar
    from cafe.cli.table import EmbeddingTable
    from cafe.errors import DataError

    with replacing(out) as unfinished:
        from cafe.model.vlm import CAFe

        vlm = CAFe.from_pretrained(model)
        embedded = skipped = 0
        with (
            EmbeddingTable(unfinished, inputs.columns, model) as table,
            progress_bar("embed", inputs.count) as done,
        ):
            for block, problems in inputs.blocks():
                rows, embeddings, more_problems = encode_block(vlm, block)
                table.append(rows, embeddings)
                embedded, skipped = embedded + len(rows), skipped + len(problems + more_problems)
                tell(problems + more_problems)
                done(embedded + skipped)
        if not embedded:
            raise DataError(f"{source}: nothing to embed ({skipped} inputs skipped)")
    return f"{embedded} embeddings in {out}" + (f", {skipped} inputs skipped" if skipped else "")


def tell(problems: Sequence[Skipped]) -> None:
    for problem in problems:
        print(f"skipped {problem.place}: {problem.reason}", file=sys.stderr)


def encode_block(
    vlm: CAFe, block: list[Loaded]
) -> tuple[list[Loaded], np.ndarray | None, list[Skipped]]:
    """Embed a block; when the model refuses it, find out which input it is and skip that one."""
    import numpy as np

    from cafe.cli.inputs import Skipped
    from cafe.index.upkeep import encode_each

    found, failures = encode_each(vlm.encode, [row.value for row in block])
    kept = [i for i in range(len(block)) if i not in failures]
    problems = [Skipped(block[i].place, str(error)) for i, error in sorted(failures.items())]
    embeddings = np.stack([found[i] for i in kept]) if kept else None
    return [block[i] for i in kept], embeddings, problems
