"""`cafe think`: a model describes the images of a training file, for think-then-embed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cafe.cli.arguments import Model, PairsData, skipped_lines


def command(
    model: Model,
    data: PairsData,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE.jsonl", help="Where to write; a file that is there is continued."
        ),
    ],
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Keys of DATA, as in a recipe: image_root=Images, …"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum length of a thought, in tokens.")
    ] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Images described together.")] = 32,
) -> None:
    """Describe the images of a training file.

    A recipe with data.*.thoughts and objective.thought_weight trains embeddings that are read
    after such a description. Several processes: torchrun --nproc-per-node N -m cafe think …
    """
    from cafe.ranks import process_group
    from cafe.recipes import load_source
    from cafe.retrieval.thinking import write_thoughts

    source = load_source(data, keys or ())
    with skipped_lines() as on_skipped, process_group() as rank:
        report = write_thoughts(
            model,
            source,
            out=out,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_skipped=on_skipped,
            show_progress_bar=True,
            rank=rank,
        )
    if rank.index:
        return
    before = f" ({report.known:,} were there)" if report.known else ""
    print(f"{report.written:,} thoughts written to {out}{before}")
    if report.without:
        print(f"{report.without:,} examples have none, and are embedded as they are")
