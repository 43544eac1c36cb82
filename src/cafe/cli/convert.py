"""`cafe convert`: a checkpoint in LLaVA-NeXT's own layout becomes one that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    source: Annotated[
        Path, typer.Argument(metavar="DIR", help="A LLaVA-NeXT checkpoint (llava_qwen).")
    ],
    to: Annotated[Path, typer.Option(metavar="DIR", help="A new directory.")],
) -> None:
    """Convert a LLaVA-NeXT checkpoint.

    The result is an ordinary LLaVA-OneVision of transformers, with the same numbers. One file of
    weights is in memory at a time.
    """
    from cafe.model.convert import convert_llava_next

    done = convert_llava_next(source, to)
    print(f"{done.tensors} weights ({done.bytes / 1e9:.2f} GB, {done.shards} files) in {to}")
    if done.ignored:
        print(f"left out, as the original never reads them: {', '.join(done.ignored)}")
