"""Everything that a run does up to its first step, and that step, without keeping anything.

What takes hours to find out otherwise: that a file is not read as meant, a prompt is wrong, a batch
does not fit in memory, or the run would take a week.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields

import torch

from cafe.data.quarantine import Quarantine, Skipped
from cafe.errors import RecipeError, TrainingError, first_line
from cafe.memory import keep_memory, peak_device_bytes, peak_host_bytes
from cafe.model.rows.collate import Collator
from cafe.model.rows.inspect import SequenceView, sequence_views
from cafe.ranks import Rank
from cafe.recipes import Recipe
from cafe.training.build import build_accelerator, build_collator, build_step, seed_everything
from cafe.training.chunks import StepChunks
from cafe.training.data import TrainingData, load_data
from cafe.training.evaluations import check_evaluations
from cafe.training.loader import StepData, Steps, check_answers_labelled
from cafe.training.log import further_losses, further_values
from cafe.training.matching import check_matchable
from cafe.training.optim import Parts, parts_of
from cafe.training.run import as_recipe, data_warnings, earlier_run
from cafe.training.state import TrainingState
from cafe.training.step import TrainingStep
from cafe.training.tuning import load_model
from cafe.training.watching import duration

_SHOWN = 10  # skipped records


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """The first batch in numbers.

    examples        number of examples
    chunks          number of forward passes with gradient
    rows            number of rows of all chunks
    tokens          tokens of all rows, without padding; a shared beginning counts once
    longest         tokens of the longest sequence
    padding_share   share of the rows' positions that is padding
    vision_tokens   tokens of images and videos among `tokens`
    labelled        tokens that the language loss is computed on
    """

    examples: int
    chunks: int
    rows: int
    tokens: int
    longest: int
    padding_share: float
    vision_tokens: int
    labelled: int


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One real step: forward, backward and update of the first batch.

    seconds            of the step; the first of a run is the slowest
    data_seconds       of reading and collating its batch, which workers do meanwhile
    contrastive        the contrastive loss of the batch
    language           nats per labelled token
    thought            contrastive loss of the embeddings after a thought; None: not trained
    soft_label         divergence from the soft labels; None: there are none
    match              cross-entropy of the match questions; None: not trained
    multi_vector       contrastive loss of the tokens' vectors; None: not trained
    host_bytes         most memory that the process has held so far; None: not known here
    device_bytes       most memory of the GPU that tensors have held; None: no GPU
    """

    seconds: float
    data_seconds: float
    contrastive: float
    language: float
    host_bytes: int | None
    device_bytes: int | None
    thought: float | None = None
    soft_label: float | None = None
    match: float | None = None
    multi_vector: float | None = None


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a run would do.

    recipe       resolved
    device       that it would run on
    steps        number of optimizer steps of the run
    examples     path of each source -> number of its examples
    skipped      records that are skipped, each with its reason
    warnings     what the run would say before its first step
    prompts      the sequences of the first example of the first batch, as the model sees them
    batch        the first batch in numbers
    parameters   part of the model -> (number of trained parameters, number of all)
    measured     its first step
    """

    recipe: Recipe
    device: str
    steps: int
    examples: dict[str, int]
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...]
    prompts: tuple[SequenceView, ...]
    batch: BatchCounts
    parameters: dict[str, tuple[int, int]]
    measured: MeasuredStep

    @property
    def expected_seconds(self) -> float:
        """Of the whole run, by its first step; without evaluation, saving and loading."""
        step, data = self.measured.seconds, self.measured.data_seconds
        workers = self.recipe.batch.workers
        return self.steps * (max(step, data / workers) if workers else step + data)

    def __str__(self) -> str:
        """What `cafe train --dry-run` prints."""
        return "\n".join(_lines(self))

    def json(self) -> str:
        """The same as a JSON object, with a key for each field."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("batch", "measured"):
            content[name] = asdict(content[name])
        for name in ("skipped", "prompts"):
            content[name] = [asdict(item) for item in content[name]]
        content["recipe"] = self.recipe.model_dump(mode="json")
        content["expected_seconds"] = self.expected_seconds
        return json.dumps(content, indent=2)


def dry_run(recipe: Recipe | str | os.PathLike[str], *, overrides: Sequence[str] = ()) -> DryRun:
    """Load everything that a recipe names, run its first step, and keep nothing.

    Args:
        recipe: As in `cafe.train`.
        overrides: As in `cafe.train`.

    Returns:
        What the run would train on, with what settings, and how long and large it would be.

    Raises:
        TrainingError: The first batch does not fit in memory, or no answer would be learned.
        CafeError: As `cafe.train`, before its first step.

    Example:
        >>> report = dry_run("run.yaml", overrides=["batch.examples=4"])
        >>> report.batch.examples, report.steps
        (4, 3)
    """
    recipe = as_recipe(recipe, overrides)
    if Rank.from_environment().size > 1:
        raise RecipeError("a dry run is one process; start it without torchrun or accelerate")
    if not torch.cuda.is_available():
        keep_memory()
    log = recipe.log.model_copy(update={"trackers": []})  # they would write to output_dir
    accelerator = build_accelerator(recipe.model_copy(update={"log": log}))
    quarantine = Quarantine(None, recipe.max_rejected)
    data = load_data(recipe, quarantine)
    check_evaluations(recipe, data.held_out)
    seed_everything(recipe.seed)
    vlm = load_model(recipe, accelerator.device)
    collator = build_collator(recipe, vlm)
    steps = Steps.of(recipe.batch, data, collator)
    check_answers_labelled(steps)
    if recipe.objective.match_weight > 0:
        check_matchable(steps)
    step, state = build_step(recipe, vlm, accelerator)

    started = time.perf_counter()
    batch = steps[0]
    data_seconds = time.perf_counter() - started
    if not batch.chunks.usable():
        raise TrainingError(f"no example of this run can be used; the first: {batch.skipped[0]}")
    measured = _measured(step, state, batch.chunks, data_seconds)
    earlier = earlier_run(recipe.output_dir)
    return DryRun(
        recipe=recipe,
        device=_device_name(accelerator.device),
        steps=data.steps,
        examples=_per_source(data),
        skipped=(*quarantine.skipped, *batch.skipped),
        warnings=(*([] if earlier is None else [earlier]), *data_warnings(recipe, data)),
        prompts=tuple(_first_views(collator, data, batch)),
        batch=_counts(collator, batch),
        parameters=_trained(parts_of(vlm)),
        measured=measured,
    )


def _measured(
    step: TrainingStep, state: TrainingState, chunks: StepChunks, data_seconds: float
) -> MeasuredStep:
    """Run one step on the chunks. The update is at the full learning rate, and nothing is kept."""
    cuda = state.device.type == "cuda"
    started = time.perf_counter()
    try:
        metrics = step(chunks)
        state.optimizer.step()
        contrastive, language = float(metrics.contrastive), float(metrics.language)
        further = further_values(metrics)
        if cuda:
            torch.cuda.synchronize(state.device)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the first batch does not fit in memory ({first_line(error)[:200]}); lower "
            "batch.chunk or set gradient_checkpointing: true"
        ) from error
    seconds = time.perf_counter() - started
    device = peak_device_bytes(state.device)
    return MeasuredStep(
        seconds, data_seconds, contrastive, language, peak_host_bytes(), device, **further
    )


def _per_source(data: TrainingData) -> dict[str, int]:
    counts: dict[str, int] = {}
    for source in data.examples.sources:
        counts[source.name] = counts.get(source.name, 0) + len(source.examples)
    return counts


def _first_views(collator: Collator, data: TrainingData, batch: StepData) -> list[SequenceView]:
    """The sequences of the first example of the batch that can be used."""
    named = {data.examples[i].id: data.examples[i] for i in data.plan.plan(0)}
    first = next((named[name] for name in batch.chunks[0].ids if name in named), None)
    return [] if first is None else sequence_views(collator, first)


def _counts(collator: Collator, batch: StepData) -> BatchCounts:
    family, processor = collator.family, collator.processor
    placeholders = {family.placeholder_id(processor), family.video_placeholder_id(processor)}
    images = torch.tensor(sorted(i for i in placeholders if i is not None))
    rows = [chunk.rows for chunk in batch.chunks]
    positions = sum(r.computed_tokens for r in rows)
    padding = positions - sum(r.tokens for r in rows)
    return BatchCounts(
        examples=sum(len(chunk.ids) for chunk in batch.chunks),
        chunks=len(batch.chunks),
        rows=sum(len(r.input_ids) for r in rows),
        tokens=positions - padding,
        longest=max(int(r.depth.max()) + 1 for r in rows),
        padding_share=padding / positions,
        vision_tokens=sum(int(torch.isin(r.input_ids, images).sum()) for r in rows),
        labelled=sum(r.label_ids.numel() for r in rows),
    )


def _trained(parts: Parts) -> dict[str, tuple[int, int]]:
    return {
        part: (
            sum(p.numel() for p in parameters.values() if p.requires_grad),
            sum(p.numel() for p in parameters.values()),
        )
        for part, parameters in parts.items()
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# ---------------------------------------------------------------------- as text


def _lines(report: DryRun) -> Iterator[str]:
    recipe, batch = report.recipe, report.batch
    yield f"model {recipe.model}, {recipe.precision} on {report.device}, {recipe.attention}"
    yield from (f"  {line}" for line in _parameter_lines(report))
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
    yield from _step_lines(report)


def _parameter_lines(report: DryRun) -> Iterator[str]:
    for part, (trained, every) in report.parameters.items():
        yield f"{part}: {trained:,} of {every:,} parameters trained"


def _step_lines(report: DryRun) -> Iterator[str]:
    step = report.measured
    further = further_losses(step)
    yield f"first step: contrastive {step.contrastive:.3f}, language {step.language:.3f}{further}"
    memory = [
        f"{size / 2**30:.1f} GiB of {place}"
        for size, place in ((step.device_bytes, "GPU memory"), (step.host_bytes, "host memory"))
        if size is not None
    ]
    yield (
        f"about {duration(report.expected_seconds)} for {report.steps:,} steps (one measured "
        f"step: {step.seconds:.2f} s){''.join(f', {part}' for part in memory)}"
    )
