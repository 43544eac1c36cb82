"""`cafe evaluate`: a model and a task, or a suite of tasks, become numbers."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cafe.cli.arguments import Model

if TYPE_CHECKING:
    from cafe.evaluate.run import Outcome


class Suite(StrEnum):
    """Which tasks run together."""

    quick = "quick"
    paper = "paper"
    all = "all"


def command(
    model: Model,
    task: Annotated[
        str | None, typer.Option(help="One task, or mteb:NAME; a name that is none lists them all.")
    ] = None,
    suite: Annotated[Suite | None, typer.Option(help="Several tasks (default: quick).")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="A task's data: folder or hub name. With a suite: the folder of their folders.",
        ),
    ] = None,
    json_out: Annotated[
        Path | None,
        typer.Option("--json", metavar="DIR", help="Keep one result file a task, and resume."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many samples only.")
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="For THRONE, repeatable: a FLAN-T5 folder or hub name, or http://HOST/v1#MODEL."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure again what --json has already.")
    ] = False,
) -> None:
    """Measure a model.

    Suites: quick (the bundled world, no data needed), paper (COCO, Flickr, MMEB, POPE, CHAIR,
    THRONE), all. Several processes: torchrun --nproc-per-node N -m cafe evaluate …
    """
    from cafe.errors import DataError

    if task is not None and suite is not None:
        raise DataError("name a --task or a --suite, not both")

    from cafe.evaluate.run import Options, run_tasks, suite_tasks
    from cafe.evaluate.spread import ranks
    from cafe.evaluate.tasks import task_names
    from cafe.model.vlm import CAFe

    chosen = None if task is not None else (suite or Suite.quick).value
    names = task_names(task) if task is not None else suite_tasks(chosen or "quick")
    options = Options(data, limit, json_out, force, tuple(judge or ()))
    failed = []
    with ranks() as rank:
        device = f"cuda:{rank.local}" if rank.size > 1 and _has_gpu() else None
        outcomes = run_tasks(
            lambda: CAFe.from_pretrained(model, device=device),
            model,
            names,
            options,
            suite=chosen,
            rank=rank,
        )
        for outcome in outcomes:
            failed += [outcome.task] if outcome.state == "failed" else []
            if rank.number == 0:
                _tell(outcome)
                if json_out is not None:
                    _draw(outcome, json_out)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(names)} tasks could not be run: {', '.join(failed)}"
        )


def _tell(outcome: Outcome) -> None:
    record = outcome.record
    if record is None:
        print(f"\n{outcome.task}  could not be run: {outcome.reason}", flush=True)
        return
    kept = " (kept)" if outcome.state == "kept" else ""
    print(f"\n{outcome.task}  {record['count']} samples{kept}")
    width = max(len(name) for name in record["scores"])
    for name, value in record["scores"].items():
        interval = record["intervals"].get(name)
        shown = "" if interval is None else f"  [{interval[0]:.4f}, {interval[1]:.4f}]"
        print(f"  {name:<{width}}  {value:.4f}{shown}", flush=True)
    if empty := record["details"].get("empty_replies"):
        print(f"  {empty} replies of the model were empty", flush=True)
    if evasive := record["details"].get("evasive_replies"):
        print(f"  {evasive} replies of judges were neither yes nor no: no votes", flush=True)
    if missing := record["details"].get("missing"):
        print(f"  not there, so not measured: {', '.join(missing)}", flush=True)


def _draw(outcome: Outcome, folder: Path) -> None:
    """The map of a result that has one, beside its file."""
    if outcome.record is None or "map/image" not in outcome.record["details"]:
        return
    import numpy as np

    from cafe.evaluate.run import result_file
    from cafe.report.map import draw_map

    details = outcome.record["details"]
    images, texts = (np.array(details[f"map/{kind}"]) for kind in ("image", "text"))
    path = result_file(folder, outcome.task).with_suffix(".png")
    draw_map(path, images, texts, outcome.record["scores"]["modality_gap"])
    print(f"  map: {path}", flush=True)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
