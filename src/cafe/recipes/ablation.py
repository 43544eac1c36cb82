"""The typed tree of an ablation: one training run, repeated with other weights and seeds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from cafe.recipes.base import Count, Name, Positive, Section
from cafe.recipes.load import load_tree

Seed = Annotated[int, Field(ge=0)]


_FIXED = ("seed", "output_dir")


class Ablation(Section):
    """Which runs, on which scenes, measured by which tasks.

    The arms derive from the objective of `recipe`: `joint` is the run itself, `language` and
    `contrastive` drop the other loss, `sweep` has other contrastive weights, and `variants` change
    other keys of the joint run.
    """

    recipe: Name = "demo"
    """The run that every arm varies: the name of a shipped recipe, or a file (.yaml) relative to
    this one's folder. The generated scenes replace its sources captions.json and questions.json."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Overrides of that recipe's keys, e.g. {schedule: {steps: 100}}."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """Random seeds of training; each of the three arms is run once per seed."""
    sweep: list[Positive] = Field(default_factory=list)
    """Further contrastive weights of the joint objective."""
    variants: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    """Further arms: name -> overrides of the joint run, e.g. {matcher: {objective: {match_weight:
    1.0}}}. The base writes the file thoughts.jsonl, for a variant that has data.0.thoughts: it."""
    sweep_seeds: Count = 1
    """Number of seeds, from the first on, that the sweep's arms are run with."""
    train_scenes: Annotated[int, Field(ge=2)] = 3000
    """Number of training scenes, the same ones in all runs."""
    train_questions: Count = 3
    """Number of questions about each training scene."""
    scenes_seed: Seed = 0
    """Random seed of the training scenes."""
    test_scenes: Annotated[int, Field(ge=2, le=500)] = 250
    """Evaluate on the first N of the held-out scenes of `cafe evaluate`."""
    tasks: Annotated[list[Name], Field(min_length=1)]
    """Tasks of `cafe evaluate` that use scenes."""

    @model_validator(mode="after")
    def _check_runs(self) -> Self:
        for name in ("seeds", "sweep", "tasks"):
            values = getattr(self, name)
            twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
            if twice is not None:
                raise ValueError(f"{name} has {twice!r} twice; name each once")
        taken = {"base", "language", "contrastive", "joint"} & set(self.variants)
        bad = next((n for n in self.variants if not re.fullmatch(r"[a-z][a-z0-9-]*", n)), None)
        if taken or bad is not None:
            name = bad if bad is not None else min(taken)
            raise ValueError(
                f"variants has {name!r}, which cannot name a further arm; use lower-case "
                "letters, digits and hyphens, and none of base, language, contrastive, joint"
            )
        fixed = next((k for v in self.variants.values() for k in v if k in _FIXED), None)
        if fixed is not None:
            raise ValueError(f"variants sets {fixed}, which is the ablation's own; drop it there")
        if self.sweep_seeds > len(self.seeds):
            raise ValueError(
                f"sweep_seeds is {self.sweep_seeds}, but there are {len(self.seeds)} seeds; "
                "expected at most as many"
            )
        return self


def load_ablation(path: str | Path, overrides: Sequence[str] = ()) -> Ablation:
    """As `load_recipe`, for an ablation. Its `recipe`, if a file, is relative as data paths are."""
    return load_tree(Path(path), overrides, Ablation, _anchor_recipe)


def _anchor_recipe(tree: dict[str, Any], folder: Path) -> None:
    """Make the path of a `recipe` that is a file, not a name, relative to `folder` absolute."""
    name = tree.get("recipe")
    if isinstance(name, str) and Path(name).suffix in (".yaml", ".yml"):
        tree["recipe"] = str((folder / Path(name).expanduser()).absolute())
