"""`cafe export`: a model, or an adapter merged into its base, as one directory for every tool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cafe.cli.arguments import Model

if TYPE_CHECKING:
    from cafe.release.card import Agreement
    from cafe.release.cross_encoder import CrossEncoderReport


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
            help="Compare embeddings by transformers, sentence-transformers and cafe serve; scores "
            "of a cross-encoder by sentence-transformers.",
        ),
    ] = False,
    cross_encoder: Annotated[
        Path | None,
        typer.Option(
            "--cross-encoder",
            metavar="DIR",
            help="New directory for sentence-transformers' CrossEncoder: scores pairs as `rerank`.",
        ),
    ] = None,
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
    is merged. The model card is README.md. --cross-encoder writes a second directory, a reranker by
    the match question for sentence-transformers and vLLM. Without either, --verify checks MODEL
    where it is.
    """
    from cafe.errors import CheckpointError

    if to is None and (merge or results or not (verify or cross_encoder)):
        raise CheckpointError("name a new directory: --to DIR (or use --verify alone)")
    if to is not None:
        _export(model, to, merge, verify, results or [])
    if cross_encoder is not None:
        from cafe.release.cross_encoder import export_cross_encoder

        _print_scores(export_cross_encoder(to or model, cross_encoder, verify=verify))
    elif to is None:
        _verify(model)


def _export(model: str, to: Path, merge: bool, verify: bool, results: list[Path]) -> None:
    from cafe.release.release import export

    report = export(
        model, to, merge=merge, verify=verify, results=results, on_agreement=_print_agreement
    )
    dtype = str(report.dtype).removeprefix("torch.")
    print(
        f"{to}: {'merged, ' if report.merged else ''}{dtype}; embeddings of {report.probes} probes "
        f"are at most {report.distance:.1e} apart (tolerance {report.tolerance:.0e})"
    )


def _verify(model: str) -> None:
    from cafe.model.checkpoint.locate import locate
    from cafe.model.checkpoint.sentence_transformers_files import is_cross_encoder

    if is_cross_encoder(locate(model)):
        from cafe.release.cross_encoder import verify_cross_encoder

        _print_scores(verify_cross_encoder(model))
        return

    from cafe.release.verify import verify

    verify(model, on_agreement=_print_agreement)


def _print_scores(report: CrossEncoderReport) -> None:
    no, yes = report.tokens
    print(f"{report.directory}: log-odds of {yes!r} to {no!r}", end="")
    if report.spellings is not None:
        print(f"; at most {report.spellings:.1e} from those of all spellings", end="")
    if report.difference is not None:
        print(f"; CrossEncoder at most {report.difference:.1e} from cafe", end="")
    print(f" ({report.pairs} pairs)")


def _print_agreement(agreement: Agreement) -> None:
    print(
        f"{agreement.tool}: smallest cosine {agreement.cosine:.7f}, "
        f"largest distance {agreement.distance:.1e}",
        flush=True,
    )
