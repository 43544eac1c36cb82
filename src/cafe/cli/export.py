"""`cafe export`: a model, or an adapter merged into its base, as one directory for every tool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cafe.cli.arguments import Model
from cafe.errors import CheckpointError

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
    push: Annotated[
        str | None,
        typer.Option(
            "--push",
            metavar="OWNER/NAME",
            help="Upload the written directory (without --to: MODEL's) to this hub repository.",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: a new repository is private.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="With --push: check and list everything, upload nothing."),
    ] = False,
) -> None:
    """Write a model as one directory.

    transformers, sentence-transformers, vLLM and cafe load it. The written model is read back and
    must embed as MODEL does; an adapter stays an adapter, which only peft and cafe load, unless it
    is merged. The model card is README.md. --cross-encoder writes a second directory, a reranker by
    the match question for sentence-transformers and vLLM. Without either, --verify checks MODEL
    where it is. --push uploads the result to the hub.
    """
    if to is None and (merge or results or not (verify or cross_encoder or push)):
        raise CheckpointError("name a new directory: --to DIR (or use --verify alone)")
    if push is None and (private or dry_run):
        raise CheckpointError("--private and --dry-run belong to --push OWNER/NAME")
    if to is not None:
        _export(model, to, merge, verify, results or [])
    if cross_encoder is not None:
        from cafe.release.cross_encoder import export_cross_encoder

        _print_scores(export_cross_encoder(to or model, cross_encoder, verify=verify))
    elif to is None and verify:
        _verify(model)
    if push is not None:
        _push(to or model, push, private, dry_run)


def _push(directory: str | Path, repository: str, private: bool, dry_run: bool) -> None:
    from cafe.model.checkpoint.locate import locate
    from cafe.release.push import push_to_hub

    report = push_to_hub(locate(str(directory)), repository, private=private, dry_run=dry_run)
    print(f"{len(report.files)} files, {report.size / 1e6:.1f} MB, as {report.owner}:")
    for name in report.files:
        print(f"  {name}")
    state = "is there" if report.exists else "is new"
    print(report.url or f"nothing was uploaded; the repository {report.repository} {state}")


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
