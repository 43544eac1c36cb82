"""What happens while a run goes on: evaluations, checkpoints, and what is logged."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from cafe.recipes.base import (
    Count,
    Name,
    Positive,
    Section,
    UserPath,
    check_distinct,
    share_of,
)
from cafe.recipes.source import DataSource


class Evaluate(Section):
    """What is measured before the first step, at intervals, and after the last step."""

    every_steps: Count | None = None
    """Steps between evaluations. Set this or every_minutes."""
    every_minutes: Positive | None = None
    """Minutes of training between evaluations. Set this or every_steps."""
    data: DataSource | None = None
    """A source that is not trained on. Set this or held_out (or tasks alone)."""
    held_out: Annotated[float | int | None, share_of("examples", 0.01, optional=True)] = None
    """Examples that are taken off the training data by the seed, all about an image together: a
    fraction, or a whole number."""
    samples: Annotated[int, Field(ge=0)] = 2
    """Number of held-out examples, always the same, that the model answers into the log."""
    tasks: Annotated[list[Name], AfterValidator(check_distinct)] = Field(default_factory=list)
    """Further tasks, by the names that `cafe evaluate --task` takes."""
    tasks_data: UserPath | None = None
    """Folder above the folders of the tasks' data sets; None: generated scenes, or the hub's."""
    tasks_limit: Count | None = None
    """Use the first N samples of each task only."""
    patience: Count | None = None
    """End the run after this many evaluations without a better value of checkpoint.best."""

    @model_validator(mode="after")
    def _check_when_and_what(self) -> Self:
        if (self.every_steps is None) == (self.every_minutes is None):
            state = "neither is" if self.every_steps is None else "both are"
            raise ValueError(
                f"set exactly one of every_steps and every_minutes (null unsets); {state} set"
            )
        if self.data is not None and self.held_out is not None:
            raise ValueError("data and held_out are both set; set one of them (null unsets)")
        if self.data is None and self.held_out is None and not self.tasks:
            raise ValueError(
                "there is nothing to measure on; set held_out (e.g. 0.01), data, or tasks"
            )
        for name in ("weight", "groups", "thoughts", "scores"):
            default = DataSource.model_fields[name].default
            if self.data is not None and getattr(self.data, name) != default:
                raise ValueError(f"data.{name} is for training; leave it out")
        if not self.tasks and (self.tasks_data is not None or self.tasks_limit is not None):
            raise ValueError("tasks_data and tasks_limit are for tasks, and none is named")
        return self


class Checkpoint(Section):
    """When the state of the run is saved."""

    every_steps: Count | None = None
    """Steps between checkpoints. None: at the end only (and when the run is interrupted)."""
    keep: Count = 2
    """Number of most recent checkpoints to keep."""
    best: Name | None = None
    """Measure of `evaluate`; the model with the best value is kept in output_dir/best. None: only
    the last one is kept."""


class Log(Section):
    """What the run reports."""

    every_steps: Count = 1
    """Steps between lines of the JSONL log."""
    trackers: list[Name] = Field(default_factory=list)
    """Experiment trackers of accelerate, e.g. tensorboard or wandb."""
    progress: bool = True
    """Show a progress bar."""
