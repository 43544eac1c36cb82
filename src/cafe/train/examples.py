"""A recipe's data sources -> the examples of a run, its plan, and what was left out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from cafe.data.batches import BatchPlan
from cafe.data.dataset import ExampleSet, Source
from cafe.data.quarantine import Quarantine
from cafe.data.read import read_examples
from cafe.data.records import Reading
from cafe.errors import DataError
from cafe.model.official import official_example
from cafe.recipes import DataSource, Objective, Recipe
from cafe.types import Example


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Examples, numbered through; which of them make up which step; how many steps there are."""

    examples: ExampleSet
    plan: BatchPlan
    steps: int


def load_data(recipe: Recipe, quarantine: Quarantine) -> TrainingData:
    """Read every source. Records that cannot be used go to `quarantine`.

    Raises DataError when a file cannot be read, too many records are broken, or a source holds
    nothing that this objective learns from.
    """
    index = recipe.output_dir / "index"
    sources = [_read(source, recipe.objective, quarantine, index) for source in recipe.data]
    examples = ExampleSet.build(sources, merge_by_image=recipe.merge_by_image)
    plan = examples.plan(recipe.batch.examples, recipe.seed)
    schedule = recipe.schedule
    steps = schedule.steps or ceil((schedule.epochs or 0) * plan.steps_per_epoch)
    return TrainingData(examples, plan, steps)


def reading(source: DataSource) -> Reading:
    """How a source of the recipe is read."""
    return Reading(
        format=source.format,
        mode=source.mode,
        turns=source.turns,
        language_loss=source.language_loss,
        embedding_prompt=source.embedding_prompt,
        task=source.task,
        columns=source.columns,
        split=source.split,
        image_root=source.image_root,
        pixel_budget=source.max_pixels,
        limit=source.limit,
    )


def _read(source: DataSource, objective: Objective, quarantine: Quarantine, index: Path) -> Source:
    records = read_examples(source.path, reading(source), index=index)
    quarantine.add(records.rejected, seen=len(records))
    if not records.examples:
        reason = str(records.rejected[0]) if records.rejected else "it has no records"
        raise DataError(f"{source.path}: no record can be used ({reason})")
    useful = [e for example in records.examples if (e := trained_part(example, objective))]
    if not useful:
        missing = "pairs" if objective.language_weight == 0 else "answers"
        raise DataError(
            f"{source.path} (mode: {source.mode or 'of the format ' + records.format}): its "
            f"examples have no {missing}, which is all that this objective learns from; change the "
            "mode, language_loss, or the objective's weights"
        )
    return Source(source.path, useful, source.weight)


def trained_part(example: Example, objective: Objective) -> Example | None:
    """The example without what a zero weight makes idle; None if nothing remains.

    Its `target_id` stays, so that the weights change nothing about which examples share a batch.
    """
    if objective.compat == "official":
        example = official_example(example)
    if objective.contrastive_weight == 0 and example.query is not None:
        if not example.dialogues:
            return None
        example = replace(example, query=None, target=None, negatives=())
    if objective.language_weight == 0:
        if example.query is None:
            return None
        example = replace(example, dialogues=())
    return example
