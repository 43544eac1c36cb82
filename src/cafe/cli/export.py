"""`cafe export`: a model, or an adapter merged into its base, as one directory for every tool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cafe.cli.arguments import Model

if TYPE_CHECKING:
    from cafe.release.card import Agreement


def command(
    model: Model,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="New directory to write.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge an adapter into its base's weights.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare embeddings by transformers, sentence-transformers and cafe serve.",
        ),
    ] = False,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            "--results",
            metavar="RESULT",
            help="Results of `cafe evaluate` for the model card: files or a folder; repeatable.",
        ),
    ] = None,
) -> None:
    """Write a model as one directory.

    transformers, sentence-transformers, vLLM and cafe load it. The written model is read back and
    must embed as MODEL does; an adapter stays an adapter, which only peft and cafe load, unless it
    is merged. The model card is README.md. Without --to, --verify checks MODEL where it is.
    """
    from cafe.errors import CheckpointError

    if to is None:
        if not verify or merge or results:
            raise CheckpointError("name a new directory: --to DIR (or use --verify alone)")
        from cafe.release.verify import verify as verify_directory

        verify_directory(model, on_agreement=_print_agreement)
        return

    from cafe.release.release import export

    report = export(
        model, to, merge=merge, verify=verify, results=results or (), on_agreement=_print_agreement
    )
    dtype = str(report.dtype).removeprefix("torch.")
    print(
        f"{to}: {'merged, ' if report.merged else ''}{dtype}; embeddings of {report.probes} probes "
        f"are at most {report.distance:.1e} apart (tolerance {report.tolerance:.0e})"
    )


def _print_agreement(agreement: Agreement) -> None:
    print(
        f"{agreement.tool}: smallest cosine {agreement.cosine:.7f}, "
        f"largest distance {agreement.distance:.1e}",
        flush=True,
    )
