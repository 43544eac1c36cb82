"""The typed tree of an ablation: one training run, again and again with other weights and seeds."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from cafe.recipes.tree import Count, Name, Positive, Section

Seed = Annotated[int, Field(ge=0)]


class Ablation(Section):
    """Which runs, on which scenes, measured by which tasks.

    The arms come from the objective of `recipe`: `joint` is that run as it is, `language` and
    `contrastive` are the same without the other loss, and `sweep` has other contrastive weights.
    """

    recipe: Name = "demo"
    """The run that every arm is: the name of a recipe that ships, or a file (.yaml) relative to
    this one's folder. Its sources captions.json and questions.json become the written scenes."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Changes to that recipe, under its own keys, e.g. {schedule: {steps: 100}}."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """Of training, one run of each of the three arms for each."""
    sweep: list[Positive] = Field(default_factory=list)
    """Further contrastive weights of the joint objective."""
    sweep_seeds: Count = 1
    """How many of the seeds, from the first on, the sweep's runs have."""
    train_scenes: Annotated[int, Field(ge=2)] = 3000
    """Scenes to train on, the same in all runs."""
    train_questions: Count = 3
    """Questions about each of them."""
    scenes_seed: Seed = 0
    """Of the scenes to train on."""
    test_scenes: Annotated[int, Field(ge=2, le=500)] = 250
    """The first so many of the held-out scenes that `cafe evaluate` draws."""
    tasks: Annotated[list[Name], Field(min_length=1)]
    """Tasks of `cafe evaluate` that run on scenes."""

    @model_validator(mode="after")
    def _check_runs(self) -> Self:
        for name in ("seeds", "sweep", "tasks"):
            values = getattr(self, name)
            twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
            if twice is not None:
                raise ValueError(f"{name} has {twice!r} twice; name each once")
        if self.sweep_seeds > len(self.seeds):
            raise ValueError(
                f"sweep_seeds is {self.sweep_seeds}, but there are {len(self.seeds)} seeds; "
                "expected at most as many"
            )
        return self
