"""`cafe embed`: texts, pictures, or both together become embeddings in Parquet or LanceDB."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cafe.cli.arguments import Model

if TYPE_CHECKING:
    import numpy as np

    from cafe.cli.inputs import Loaded, Skipped, Source
    from cafe.cli.shards import Ranks
    from cafe.model.vlm import CAFe


class Engine(StrEnum):
    """Who runs the shards."""

    local = "local"
    ray = "ray"


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
    engine: Annotated[
        Engine, typer.Option(help="ray: shards on Ray Data, on the cluster at RAY_ADDRESS or here.")
    ] = Engine.local,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of --engine ray (default: one per GPU, else one)."),
    ] = None,
) -> None:
    """Write embeddings of texts and pictures.

    Broken inputs are listed on stderr, counted, and skipped. Under torchrun each process embeds its
    share of the files, on its own GPU.
    """
    from functools import partial

    from cafe.cli.inputs import open_source
    from cafe.cli.shards import Ranks, embed_shards, open_files, open_table
    from cafe.errors import DataError

    if (out is None) == (to is None):
        raise DataError("name where to write: --out FILE.parquet, or --to DIR for a LanceDB table")
    ranks = Ranks.here()
    _check_engine(engine, workers, ranks, in_shards=to is not None or shard_size is not None)
    inputs = open_source(source)  # before torch: a wrong path is told at once
    size = shard_size or TABLE_SHARD
    if to is not None:
        opened = partial(open_table, source, inputs, to, size)
    elif out is not None and shard_size is not None:
        if out.suffix == ".parquet" or out.is_file():
            raise DataError(f"{out}: with --shard-size, name a folder")
        opened = partial(open_files, model, source, inputs, out, size)
    else:
        assert out is not None
        if ranks.count > 1:
            raise DataError(f"{out}: {ranks.count} processes cannot write one file; --shard-size")
        print(_embed_to_one(model, source, inputs, out))
        return
    if engine is Engine.ray:
        from cafe.cli.shards_ray import embed_with_ray

        print(embed_with_ray(model, source, inputs, opened, size, workers))
    else:
        print(embed_shards(model, source, inputs, opened, size, ranks))


def _check_engine(engine: Engine, workers: int | None, ranks: Ranks, *, in_shards: bool) -> None:
    """Raises DataError for options that do not go together."""
    from cafe.errors import DataError

    if engine is Engine.local:
        if workers is not None:
            raise DataError("--workers is for --engine ray; without it, use torchrun")
    elif ranks.count > 1:
        raise DataError("--engine ray starts its own processes: run it without torchrun")
    elif not in_shards:
        raise DataError("--engine ray writes in shards: give --shard-size N, or --to DIR")


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
