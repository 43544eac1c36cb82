"""The arms of an ablation, and the complete training recipe of each run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from cafe.errors import RecipeError
from cafe.recipes import Ablation, DataSource, Objective, Recipe, load_recipe

BASE, LANGUAGE, CONTRASTIVE, JOINT = "base", "language", "contrastive", "joint"
"""The arms that every ablation has; the base is evaluated but not trained."""

SCENE_FILES = ("captions.json", "questions.json")
THOUGHTS = "thoughts.jsonl"
"""What the base says of each training scene, next to the scenes."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One training variant. `name` is also the name of its folder.

    variant   its recipe differs in more than the weights (`Ablation.variants`)
    """

    name: str
    contrastive_weight: float
    language_weight: float
    seeds: tuple[int, ...]
    variant: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """One arm with one seed."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}/seed-{self.seed}"


def common_recipe(ablation: Ablation, variant: str | None = None) -> Recipe:
    """The recipe that all arms share, before their own weights and seeds; or that of a variant.

    Raises:
        RecipeError: there is no such recipe, it has one loss only, or as in `load_recipe`.
    """
    changes = list(_overrides(ablation.training))
    if variant is not None:
        changes += _overrides(ablation.variants[variant])
    shipped = files("cafe.recipes") / f"{ablation.recipe}.yaml"
    if Path(ablation.recipe).suffix not in (".yaml", ".yml"):
        if not shipped.is_file():
            raise RecipeError(
                f"recipe is {ablation.recipe!r}, which does not ship with cafe; give one that "
                "does, such as demo, or a file that ends in .yaml"
            )
        with as_file(shipped) as path:
            recipe = load_recipe(path, changes)
    else:
        recipe = load_recipe(ablation.recipe, changes)
    if min(recipe.objective.contrastive_weight, recipe.objective.language_weight) == 0:
        raise RecipeError(
            f"recipe {ablation.recipe}: one of its losses has weight 0; an ablation removes "
            "losses from a recipe that has both"
        )
    return recipe


def arms(ablation: Ablation, objective: Objective) -> tuple[Arm, ...]:
    """Language only, contrastive only, joint, and joint with each contrastive weight of the sweep.

    Raises:
        RecipeError: the sweep contains the weight of `joint`.
    """
    contrastive, language = objective.contrastive_weight, objective.language_weight
    if contrastive in ablation.sweep:
        raise RecipeError(
            f"sweep has {contrastive:g}, the recipe's own contrastive weight, which the arm joint "
            "already has; remove it"
        )
    seeds = tuple(ablation.seeds)
    fewer = seeds[: ablation.sweep_seeds]
    return (
        Arm(LANGUAGE, 0.0, language, seeds),
        Arm(CONTRASTIVE, contrastive, 0.0, seeds),
        Arm(JOINT, contrastive, language, seeds),
        *(Arm(f"{JOINT}-{weight:g}", weight, language, fewer) for weight in ablation.sweep),
        *(_variant(ablation, name, seeds) for name in ablation.variants),
    )


def _variant(ablation: Ablation, name: str, seeds: tuple[int, ...]) -> Arm:
    objective = common_recipe(ablation, name).objective
    weights = objective.contrastive_weight, objective.language_weight
    return Arm(name, *weights, seeds, variant=True)


def recipe_of(ablation: Ablation, arm: Arm) -> Recipe:
    """The recipe of an arm, before its weights and seed."""
    return common_recipe(ablation, arm.name if arm.variant else None)


def runs(arms: tuple[Arm, ...]) -> list[Run]:
    """Seed by seed, so that an ablation that is stopped early has arms to compare."""
    seeds = dict.fromkeys(seed for arm in arms for seed in arm.seeds)
    return [Run(arm, seed) for seed in seeds for arm in arms if seed in arm.seeds]


def run_recipe(common: Recipe, run: Run, scenes: Path, output_dir: Path) -> Recipe:
    """The recipe of one run: `common` with its weights and seed, on the scenes in `scenes`.

    Sources that only train answers are omitted from runs without the language loss. All runs of
    one seed have the same batches in the same order, regardless of their weights.
    """
    data = [_on_scenes(source, scenes) for source in common.data]
    if run.arm.language_weight == 0:
        data = [source for source in data if source.mode != "chat"]
    weights: dict[str, float | str] = {
        "contrastive_weight": run.arm.contrastive_weight,
        "language_weight": run.arm.language_weight,
    }
    if run.arm.contrastive_weight == 0:  # nothing would train what embeddings are read after
        weights |= {"latent_tokens": 0, "thought_weight": 0.0, "match_weight": 0.0}
        weights |= {"multi_vector_weight": 0.0, "soft_label_weight": 0.0}
        weights["latent_pooling"] = "last"
    return common.model_copy(
        update={
            "data": data,
            "objective": common.objective.model_copy(update=weights),
            "seed": run.seed,
            "output_dir": output_dir,
        }
    )


def difference(wanted: Recipe, existing: Recipe) -> str | None:
    """The first key in which two runs differ, with both values; None if they are the same run."""
    own, other = (dict(_leaves(r.model_dump(mode="json"))) for r in (wanted, existing))
    for key in own | other:
        if key.startswith(("output_dir", "log.", "checkpoint.")):
            continue
        if own.get(key) != other.get(key):
            return f"{key} is {other.get(key)!r} there and {own.get(key)!r} here"
    return None


def _on_scenes(source: DataSource, scenes: Path) -> DataSource:
    changes = {}
    if (name := Path(source.path).name) in SCENE_FILES:
        changes["path"] = str(scenes / name)
    if source.thoughts is not None and Path(source.thoughts).name == THOUGHTS:
        changes["thoughts"] = str(scenes / THOUGHTS)
    return source.model_copy(update=changes)


def _overrides(changes: Mapping[str, Any]) -> Iterator[str]:
    """Nested keys as `key=value`, with the value as JSON, which is also YAML."""
    for key, value in _leaves(changes):
        yield f"{key}={json.dumps(value)}"


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of dotted key and value; a list is a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
