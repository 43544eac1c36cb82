"""`cafe export`: a model, or an adapter merged into its base, as one directory for every tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cafe.cli.arguments import Model


def command(
    model: Model,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A new directory to write.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Add an adapter's updates to its base's weights.")
    ] = False,
) -> None:
    """Write a model as one directory.

    transformers, sentence-transformers, vLLM and cafe read it. It is read back and must embed as
    MODEL does; an adapter stays an adapter, which only peft and cafe read, unless it is merged.
    """
    from cafe.errors import CheckpointError

    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CheckpointError(f"{to}: is there already; name a new directory")

    from safetensors import SafetensorError

    from cafe.model.export import export
    from cafe.train.checkpoints import whole_directory

    try:
        with whole_directory(to.absolute()) as unfinished:
            done = export(model, unfinished, merge=merge)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{to}: cannot be written ({' '.join(str(error).split())})"
        ) from error
    dtype = str(done.dtype).removeprefix("torch.")
    print(
        f"{to}: {'merged, ' if merge else ''}{dtype}; embeddings of {done.probes} probes are "
        f"at most {done.distance:.1e} apart (tolerance {done.tolerance:.0e})"
    )
