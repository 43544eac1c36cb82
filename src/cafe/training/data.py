"""A recipe's data sources -> the examples of a run and the plan of its batches."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path

from cafe.data.batches import BatchPlan
from cafe.data.dataset import ExampleSet, ExampleSource
from cafe.data.fingerprint import fingerprint
from cafe.data.groups import check_groups, digest_of, read_groups
from cafe.data.quarantine import Quarantine
from cafe.data.read import read_examples
from cafe.data.records import ReadOptions, Records
from cafe.data.thoughts import with_thoughts
from cafe.errors import DataError
from cafe.model.rows.official import official_example
from cafe.recipes import DataSource, Objective, Recipe
from cafe.training.held_out import HeldOut, held_out_examples, split_off
from cafe.types import Example


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The examples of a run, and which of them make up which step.

    examples   all of them, numbered consecutively over the sources
    plan       step -> numbers of its examples
    steps      number of steps of the run
    origin     name of a source in messages -> fingerprint of its examples
    changes    for each source, what was changed in its records -> in how many
    held_out   what the run is measured on; None: nothing, or tasks alone
    """

    examples: ExampleSet
    plan: BatchPlan
    steps: int
    origin: dict[str, str] = field(default_factory=dict)
    changes: dict[str, Counter[str]] = field(default_factory=dict)
    held_out: HeldOut | None = None


def load_data(recipe: Recipe, quarantine: Quarantine, *, index: Path | None = None) -> TrainingData:
    """Read every source of a recipe.

    Args:
        recipe: Its `data`, `evaluate`, `objective`, `batch`, `schedule` and `seed` are used.
        quarantine: Records that cannot be used are added to it.
        index: A folder that keeps the indices of archives; None: they are not kept.

    Returns:
        The examples, their plan and their fingerprints, and the examples that are held out.

    Raises:
        DataError: A file cannot be read, too many records cannot be used, or a source contains
            nothing that this objective learns from.
    """
    origin: dict[str, str] = {}
    changes: dict[str, Counter[str]] = {}
    read: list[Records] = []
    for number, source in enumerate(recipe.data):
        records = _records(source, quarantine, index)
        changes[source.path] = records.changes
        if source.thoughts is not None and recipe.objective.thought_weight > 0:
            thoughtful = with_thoughts(records.examples, source.thoughts, records.changes)
            records = replace(records, examples=thoughtful)
        origin[f"the data of data.{number}"] = fingerprint(records.examples)
        read.append(records)
    read, taken = _without_held_out(recipe, read)
    sources = []
    for number, (source, records) in enumerate(zip(recipe.data, read, strict=True)):
        trained = _trained(source, records, recipe.objective)
        if source.groups is not None:
            groups = read_groups(Path(source.groups))
            check_groups(trained.examples, groups, Path(source.groups))
            origin[f"the grouping of data.{number}"] = digest_of(groups)
            trained = replace(trained, groups=groups)
        sources.append(trained)
    _check_learned(recipe.objective, sources)
    examples = ExampleSet.build(sources, merge_by_image=recipe.merge_by_image)
    plan = examples.plan(recipe.batch.examples, recipe.seed)
    schedule = recipe.schedule
    steps = schedule.steps or ceil((schedule.epochs or 0) * plan.steps_per_epoch)
    held_out = held_out_examples(recipe, taken, examples, index)
    return TrainingData(examples, plan, steps, origin, changes, held_out)


def _without_held_out(recipe: Recipe, read: list[Records]) -> tuple[list[Records], list[Example]]:
    """The records that are trained on, and the examples that `evaluate.held_out` takes off them."""
    if recipe.evaluate is None or recipe.evaluate.held_out is None:
        return read, []
    sources = [records.examples for records in read]
    rest, taken = split_off(sources, recipe.evaluate.held_out, recipe.seed)
    for source, kept in zip(recipe.data, rest, strict=True):
        if not kept:
            raise DataError(
                f"evaluate.held_out: {recipe.evaluate.held_out} takes every example of "
                f"{source.path}, and none is left to train on; lower it"
            )
    kept_records = zip(read, rest, strict=True)
    return [replace(records, examples=kept) for records, kept in kept_records], taken


def _check_learned(objective: Objective, sources: list[ExampleSource]) -> None:
    """Raises DataError where a part of the objective has nothing to learn from."""
    if objective.latent_tokens and not any(e.query for s in sources for e in s.examples):
        raise DataError(
            "objective.latent_tokens: none of the examples is a pair, so the tokens would not be "
            "learned, and every embedding would be read after them; set it to 0"
        )
    scored = (e.scores for s in sources for e in s.examples)
    stored = objective.soft_labels == "scores" and objective.soft_label_weight > 0
    if stored and not any(scores is not None and len(scores) > 1 for scores in scored):
        raise DataError(
            "objective.soft_label_weight: no pair has scores of two candidates or more; give hard "
            "negatives and their scores (data.*.scores names the column), or set it to 0"
        )


def _records(source: DataSource, quarantine: Quarantine, index: Path | None) -> Records:
    records = read_examples(source.path, ReadOptions.of(source), index=index)
    quarantine.add(records.skipped, seen=len(records))
    if not records.examples:
        reason = str(records.skipped[0]) if records.skipped else "it has no records"
        raise DataError(f"{source.path}: no record can be used ({reason})")
    return records


def _trained(source: DataSource, records: Records, objective: Objective) -> ExampleSource:
    useful = [e for example in records.examples if (e := trained_part(example, objective))]
    if not useful:
        missing = "pairs" if objective.language_weight == 0 else "answers"
        raise DataError(
            f"{source.path} (mode: {source.mode or 'of the format ' + records.format}): its "
            f"examples have no {missing}, which is all that this objective learns from; change the "
            "mode, language_loss, or the objective's weights"
        )
    return ExampleSource(source.path, useful, source.weight)


def trained_part(example: Example, objective: Objective) -> Example | None:
    """The example without the parts whose loss has weight zero; None if nothing remains.

    Its `target_id` stays, so that the weights do not change which examples share a batch.
    """
    if objective.compat == "official":
        example = official_example(example)
    if objective.contrastive_weight == 0 and example.query is not None:
        if not example.dialogues:
            return None
        example = replace(example, query=None, target=None, negatives=(), scores=None)
    if objective.language_weight == 0:
        if example.query is None:
            return None
        example = replace(example, dialogues=())
    return example
