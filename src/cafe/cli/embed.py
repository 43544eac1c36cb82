"""`cafe embed`: texts, pictures, or both together become a Parquet file of embeddings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cafe.cli.arguments import Model

if TYPE_CHECKING:
    import numpy as np

    from cafe.cli.inputs import Loaded, Skipped
    from cafe.model.vlm import CAFe


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
    out: Annotated[Path, typer.Option(metavar="FILE.parquet", help="Where to write.")],
) -> None:
    """Write embeddings of texts and pictures.

    Broken inputs are listed on stderr, counted, and skipped.
    """
    from cafe.cli.files import replacing
    from cafe.cli.inputs import open_source
    from cafe.cli.progress import progress_bar
    from cafe.cli.table import EmbeddingTable
    from cafe.errors import DataError

    inputs = open_source(source)  # before torch: a wrong path is told at once
    with replacing(out) as unfinished:
        from cafe.model.vlm import CAFe

        vlm = CAFe.from_pretrained(model)
        embedded = skipped = 0
        with (
            EmbeddingTable(unfinished, inputs.columns, model) as table,
            progress_bar("embed", inputs.count) as done,
        ):
            for block, problems in inputs.blocks():
                rows, embeddings, more_problems = _encode(vlm, block)
                table.append(rows, embeddings)
                embedded, skipped = embedded + len(rows), skipped + len(problems + more_problems)
                for problem in problems + more_problems:
                    print(f"skipped {problem.place}: {problem.reason}", file=sys.stderr)
                done(embedded + skipped)
        if not embedded:
            raise DataError(f"{source}: nothing to embed ({skipped} inputs skipped)")
    print(f"{embedded} embeddings in {out}" + (f", {skipped} inputs skipped" if skipped else ""))


def _encode(
    vlm: CAFe, block: list[Loaded]
) -> tuple[list[Loaded], np.ndarray | None, list[Skipped]]:
    """Embed a block; when the model refuses it, find out which input it is and skip that one."""
    from cafe.cli.inputs import Skipped
    from cafe.errors import DataError

    if not block:
        return [], None, []
    try:
        return block, vlm.encode([row.value for row in block]), []
    except DataError as error:
        if len(block) == 1:
            return [], None, [Skipped(block[0].place, str(error))]
    import numpy as np

    parts = [_encode(vlm, [row]) for row in block]
    rows = [row for kept, _, _ in parts for row in kept]
    arrays = [array for _, array, _ in parts if array is not None]
    problems = [problem for _, _, found in parts for problem in found]
    return rows, np.concatenate(arrays) if arrays else None, problems
