"""`cafe convert`: convert a checkpoint in LLaVA-NeXT's own layout to one for transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    source: Annotated[
        str, typer.Argument(metavar="DIR", help="A LLaVA-NeXT checkpoint (llava_qwen).")
    ],
    to: Annotated[Path, typer.Option(metavar="DIR", help="New directory to write.")],
) -> None:
    """Convert a LLaVA-NeXT checkpoint.

    The result is a standard LLaVA-OneVision checkpoint of transformers with the same weights. One
    weights file is in memory at a time.
    """
    from cafe.model.checkpoint.convert import convert

    report = convert(source, to)
    print(f"{report.tensors} weights ({report.bytes / 1e9:.2f} GB, {report.shards} files) in {to}")
    if report.ignored:
        print(f"skipped, because the original never reads them: {', '.join(report.ignored)}")
