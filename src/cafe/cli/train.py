"""`cafe train`: fine-tune a model as a recipe, with overrides, describes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cafe.cli import completion

if TYPE_CHECKING:
    from cafe.training.dry_run import DryRun

_SHOWN = 10  # skipped records


def command(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE.yaml",
            help="The run as a YAML file.",
            autocompletion=completion.recipes,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Overrides, e.g. optimizer.learning_rate=2e-5."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the newest checkpoint in output_dir.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Read everything, run one step, print what the run would be; write nothing.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print it as JSON.")
    ] = False,
) -> None:
    """Train a model from a recipe.

    Any key of the recipe can be overridden on the command line. Ctrl-C (exit code 130) and SIGTERM
    (143) finish the step, save, and print the command that resumes the run.
    """
    from cafe.errors import DataError
    from cafe.recipes import load_recipe

    if dry_run and resume:
        raise DataError("--dry-run runs the first step of a new run; leave out --resume")
    if as_json and not dry_run:
        raise DataError("--json prints a dry run; add --dry-run")
    _check_exists(recipe)
    checked = load_recipe(recipe, overrides or [])  # before torch, so that a typo fails immediately
    if dry_run:
        from cafe.training import dry_run as dry

        report = dry.dry_run(checked)
        print(_json(report) if as_json else "\n".join(_lines(report)))
        return

    from cafe.training.run import train

    result = train(checked, resume=resume)
    if os.environ.get("RANK", "0") == "0":
        print(f"the model is in {result.model_dir}, the log in {result.log_path}")


def _check_exists(recipe: Path) -> None:
    """A recipe shipped with cafe must be copied first: its data paths are relative to its folder.

    Raises RecipeError, with the command that copies it.
    """
    import shlex

    import cafe.recipes
    from cafe.errors import RecipeError

    shipped = Path(cafe.recipes.__file__).parent / recipe.name
    if not recipe.exists() and shipped.is_file():
        raise RecipeError(
            f"{recipe}: no such file. cafe ships with a recipe of that name; copy it, adapt it, "
            f"and train the copy: cp {shlex.quote(str(shipped))} {shlex.quote(str(recipe))}"
        )


# ---------------------------------------------------------------------- a dry run, printed


def _json(report: DryRun) -> str:
    import json
    from dataclasses import asdict, fields

    content = {f.name: getattr(report, f.name) for f in fields(report)}
    for name in ("batch", "measured"):
        content[name] = asdict(content[name])
    for name in ("skipped", "prompts"):
        content[name] = [asdict(item) for item in content[name]]
    content["recipe"] = report.recipe.model_dump(mode="json")
    content["expected_seconds"] = report.expected_seconds
    return json.dumps(content, indent=2)


def _lines(report: DryRun) -> Iterator[str]:
    recipe, batch = report.recipe, report.batch
    yield f"model {recipe.model}, {recipe.precision} on {report.device}, {recipe.attention}"
    yield from (f"  {line}" for line in _parameters(report))
    yield f"{recipe.tuning.kind} tuning, learning rate {recipe.optimizer.learning_rate:g}"
    for path, count in report.examples.items():
        yield f"{path}: {count:,} examples"
    if report.skipped:
        yield f"{len(report.skipped):,} records skipped"
        yield from (f"  {item}" for item in report.skipped[:_SHOWN])
        if len(report.skipped) > _SHOWN:
            yield f"  and {len(report.skipped) - _SHOWN:,} more"
    yield from (
        warning if warning.startswith("warning") else f"warning: {warning}"
        for warning in report.warnings
    )
    yield "the first example of the first batch, as the model sees it:"
    for view in report.prompts:
        yield f"  {view.name} ({view.labelled_tokens} learned tokens)"
        yield from (f"    {line}" for line in "".join(r.text for r in view.runs).split("\n"))
    yield (
        f"first batch: {batch.examples} examples in {batch.chunks} chunks, {batch.rows} rows; "
        f"{batch.tokens:,} tokens ({batch.tokens / batch.examples:,.0f} per example, the longest "
        f"sequence {batch.longest:,}, padding {batch.padding_share:.0%}); {batch.vision_tokens:,} "
        f"vision tokens; {batch.labelled / batch.examples:.1f} learned tokens per example"
    )
    yield from _measured(report)


def _parameters(report: DryRun) -> Iterator[str]:
    for part, (trained, every) in report.parameters.items():
        yield f"{part}: {trained:,} of {every:,} parameters trained"


def _measured(report: DryRun) -> Iterator[str]:
    step = report.measured
    from cafe.training.log import further_losses

    further = further_losses(step)
    yield f"first step: contrastive {step.contrastive:.3f}, language {step.language:.3f}{further}"
    memory = [
        f"{size / 2**30:.1f} GiB of {place}"
        for size, place in ((step.device_bytes, "GPU memory"), (step.host_bytes, "host memory"))
        if size is not None
    ]
    yield (
        f"about {_duration(report.expected_seconds)} for {report.steps:,} steps (one measured "
        f"step: {step.seconds:.2f} s){''.join(f', {part}' for part in memory)}"
    )


def _duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever people would say."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
