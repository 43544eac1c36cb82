"""`cafe mine`: a model finds hard negatives for the pairs of a training file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cafe.cli.arguments import Model, PairsData, skipped_lines

if TYPE_CHECKING:
    from cafe.metrics.mining import HardNegatives

_MORE = "a model that ranks better, a wider --range, or --max-share 0 (no such limit) finds more"


def command(
    model: Model,
    data: PairsData,
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Where to write.")],
    window: Annotated[
        str,
        typer.Option(
            "--range", metavar="A-B", help="Skip the A best candidates, end with the B-th."
        ),
    ] = "10-50",
    margin: Annotated[
        float | None,
        typer.Option(min=0, help="Negatives score at least this much below the positive."),
    ] = None,
    max_share: Annotated[
        float,
        typer.Option(
            "--max-share",
            "--relative-margin",
            min=0,
            max=1,
            help="Negatives score at most this share of the positive; 1: all below; 0: no limit. "
            "--relative-margin is its deprecated name.",
        ),
    ] = 0.95,
    count: Annotated[int, typer.Option(min=1, help="Maximum number of negatives per query.")] = 7,
    batches: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="SIZE",
            help="Instead of negatives: groups of SIZE similar pairs that share a batch (B3).",
        ),
    ] = None,
    image_root: Annotated[
        Path | None,
        typer.Option(help="Where image paths start, in DATA and FILE; default: DATA's folder."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs embedded together.")] = 32,
) -> None:
    """Find hard negatives for a training file.

    Writes ms-swift's embedding JSONL. A pair's own target, targets with the same id, and other
    targets of the same query are never its negatives. With --batches it writes groups of ids, which
    a recipe's data.*.groups names: each pair of a group is a hard negative of the others.
    """
    options: dict[str, Any] = {
        "out": out,
        "rank_range": _ranks(window, 1 if batches else count),
        "margin": margin,
        "max_share": max_share or None,
        "image_root": image_root,
        "batch_size": batch_size,
    }
    if batches:
        _mine_batches(model, data, size=batches, **options)
    else:
        _mine_negatives(model, data, count=count, **options)


def _mine_negatives(model: str, data: str, *, out: Path, count: int, **options: Any) -> None:
    from cafe.retrieval.mining import mine_hard_negatives

    with skipped_lines() as on_skipped:
        report = mine_hard_negatives(
            model,
            data,
            out=out,
            count=count,
            on_skipped=on_skipped,
            show_progress_bar=True,
            **options,
        )
    print(_formatted(report.found, count))
    print(f"{len(report.examples)} records in {out}; in a recipe:")
    print(_recipe_entry(out, report.image_root))


def _mine_batches(model: str, data: str, *, out: Path, size: int, **options: Any) -> None:
    from cafe.recipes.base import to_yaml
    from cafe.retrieval.batch_mining import mine_batches

    with skipped_lines() as on_skipped:
        report = mine_batches(
            model,
            data,
            out=out,
            size=size,
            on_skipped=on_skipped,
            show_progress_bar=True,
            **options,
        )
    pairs = sum(map(len, report.groups))
    print(f"{pairs:,} pairs in {len(report.groups):,} groups of {size}")
    print(f"{report.removed:,} candidates scored too near the positive")
    print("of {:.1f} neighbours of a pair {:.1f} are in its group".format(*report.neighbours))
    if report.neighbours[0] < 1:
        print(f"few pairs have a neighbour, so most groups are random: {_MORE}")
    print(
        "mean score of a pair's best wrong target in its group {:.3f}, in random groups {:.3f}; in "
        "a recipe:".format(*report.hardest)
    )
    path = str(Path(data).absolute()) if Path(data).exists() else data
    source = {"path": path, "groups": str(out.absolute())}
    print(to_yaml({"data": [source], "batch": {"examples": size}}).rstrip())


def _ranks(window: str, count: int) -> tuple[int, int]:
    from cafe.errors import DataError

    match = re.fullmatch(r"(\d+)-(\d+)", window.strip())
    if match is None or int(match[2]) - int(match[1]) < count:
        raise DataError(
            f"--range {window}: expected two ranks with room for {count} negatives between them, "
            "e.g. 10-50"
        )
    return int(match[1]), int(match[2])


def _recipe_entry(out: Path, image_root: Path) -> str:
    """The recipe's `data` that reads the file, ready to paste: absolute, so true in any folder."""
    from cafe.recipes.base import to_yaml

    source = {"path": str(out.absolute())}
    if image_root.is_dir() and image_root.resolve() != out.parent.resolve():
        source["image_root"] = str(image_root.absolute())
    return to_yaml({"data": [source]}).rstrip()


def _formatted(found: HardNegatives, count: int) -> str:
    """How many queries got how many negatives, and how hard they are."""
    import numpy as np

    counts = found.counts
    full, none = int((counts == count).sum()), int((counts == 0).sum())
    lines = [
        f"{len(counts)} queries: {full} with {count} negatives, "
        f"{len(counts) - full - none} with fewer, {none} without",
        f"{found.removed} candidates scored too near the positive",
    ]
    if 2 * none > len(counts):
        lines.append(f"most queries have no negative: {_MORE}")
    if none < len(counts):
        # Of the same queries on both sides, each once: the limits hold between these means too.
        some = counts > 0
        positive = float(found.own_scores[some].mean())
        negative = float(np.nanmean(found.scores[some], axis=1).mean())
        lines.append(
            f"mean score of positives {positive:.3f}, of negatives {negative:.3f} (of the "
            f"{int(some.sum())} queries with negatives)"
        )
    return "\n".join(lines)
