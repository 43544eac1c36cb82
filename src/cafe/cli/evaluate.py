"""`cafe evaluate`: measure a model on a task, or on a suite of tasks."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cafe.cli import completion
from cafe.cli.arguments import CaptionOption, Model
from cafe.errors import printable

if TYPE_CHECKING:
    from cafe.evaluation.run import Outcome


class SuiteName(StrEnum):
    """Which tasks run together."""

    quick = "quick"
    paper = "paper"
    all = "all"


DataKeys = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Keys of --data, as in a recipe: image_root=Images, split=val, mode=pair, …",
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        help="One task, or mteb:NAME; an unknown name lists all tasks.",
        autocompletion=completion.tasks,
    ),
]
TaskData = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="A task's data: folder or hub name; for retrieval, gap and captions, what "
        "cafe train reads. With a suite: the folder of their folders.",
    ),
]


def command(
    model: Model,
    keys: DataKeys = None,
    task: TaskName = None,
    suite: Annotated[SuiteName | None, typer.Option(help="Several tasks (default: quick).")] = None,
    data: TaskData = None,
    json_out: Annotated[
        Path | None,
        typer.Option("--json", metavar="DIR", help="Keep one result file per task, and resume."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Evaluate on the first N samples only.")
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="For THRONE, repeatable: a FLAN-T5 folder or hub name, or http://HOST/v1#MODEL."
        ),
    ] = None,
    caption: CaptionOption = False,
    think: Annotated[
        bool, typer.Option("--think", help="Embed images after captions that the model writes.")
    ] = False,
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
    if caption and think:
        raise DataError("--caption and --think are two ways to use captions; name one of them")
    if keys and data is None:
        raise DataError(f"{keys[0]}: keys are those of --data; name it")

    from cafe.recipes import load_source

    source = load_source(data, keys) if data is not None and keys else data

    from cafe.evaluation.run import TasksFailedError, evaluate

    try:
        evaluate(
            model,
            task,
            suite=None if suite is None else suite.value,
            data=source,
            limit=limit,
            out=json_out,
            judges=judge or (),
            caption="think" if think else caption,
            force=force,
            on_outcome=_print_outcome,
        )
    except TasksFailedError as error:  # each reason has been printed
        count = len(error.reasons) + len(error.records)
        names = ", ".join(error.reasons)
        raise DataError(
            f"{len(error.reasons)} of {count} tasks could not be run: {names}"
        ) from error


def _print_outcome(outcome: Outcome) -> None:
    record = outcome.record
    if record is None:
        message = f"\n{outcome.task}  could not be run: {outcome.reason}"
        print(printable(message, sys.stdout), flush=True)
        return
    kept = " (kept)" if outcome.state == "kept" else ""
    print(f"\n{outcome.task}  {record['count']} samples{kept}")
    width = max(len(name) for name in record["scores"])
    for name, value in record["scores"].items():
        bounds = record["intervals"].get(name)
        interval = "" if bounds is None else f"  [{bounds[0]:.4f}, {bounds[1]:.4f}]"
        print(f"  {name:<{width}}  {value:.4f}{interval}", flush=True)
    if empty := record["details"].get("empty_replies"):
        print(f"  {empty} of the model's replies were empty", flush=True)
    if evasive := record["details"].get("evasive_replies"):
        print(f"  {evasive} judges' replies were neither yes nor no and cast no vote", flush=True)
    if missing := record["details"].get("missing"):
        print(f"  not found, so not measured: {', '.join(missing)}", flush=True)
    if outcome.map is not None:
        print(f"  map: {outcome.map}", flush=True)
