"""A task: its description (`Task`), its inputs (`TaskSetup`) and its result (`TaskResult`).

A task never sees a model, only functions that a model provides. So a test can pass a perfect model
or a constant one, and anything that implements the functions can be measured.
`cafe.evaluation.registry` lists the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe.evaluation.journal import Journal
from cafe.evaluation.scoring import Derivation, Ratio, point_scores
from cafe.metrics import Interval
from cafe.ranks import Rank
from cafe.types import Conversation, Example, Image, Scores

if TYPE_CHECKING:
    from jaxtyping import Float

    from cafe.evaluation.datasets.rows import RowSource
    from cafe.evaluation.model_calls import Calls
    from cafe.model.teacher_forced import TeacherForcedScores
    from cafe.recipes import DataSource

Encode = Callable[[Sequence[Image | str | Conversation]], "Float[np.ndarray, 'n d']"]
"""Images, texts, and inputs with both, mixed -> unit embeddings, float32 [n, d], in order."""

Generate = Callable[[Sequence[Conversation], int], list[str]]
"""Conversations and a maximum number of new tokens -> greedy answers, in order."""

JudgePairs = Callable[[Sequence[tuple[Image, str]]], "Float[np.ndarray, ' n']"]
"""Images with texts -> log-odds of "yes" to the match question, or log P(text | image); float32
[n], in order."""

ScoreExamples = Callable[[Sequence[Example]], "list[TeacherForcedScores]"]
"""Examples -> their embeddings and the teacher-forced scores of their answers, in order."""


@dataclass(frozen=True, slots=True)
class Task:
    """The description of a task.

    run           measures
    settings      prompts and lengths, for the result file
    hub           the data set's name on the hub; None: scenes, or a local folder (`needs_folder`)
    folder        its subfolder in the folder of a suite's data; "": the task's name
    needs_folder  there is no default data: the user must name a local folder
    version       incremented when a score changes its meaning
    """

    run: Callable[[TaskSetup], TaskResult]
    settings: Mapping[str, Any]
    hub: str | None = None
    folder: str = ""
    needs_folder: bool = False
    version: int = 1


@dataclass(frozen=True, slots=True)
class TaskSetup:
    """The inputs of a task.

    calls     the model's functions
    data      a local folder in the data set's layout, a hub name, a data source of training with
              its keys, or None: generated scenes
    limit     use the first N samples only
    judges    the judges of THRONE, as `make_judge` takes them; empty: the paper's
    journal   answers of an earlier, interrupted run
    rank      this process among those that share the work
    """

    calls: Calls
    data: RowSource | DataSource | None = None
    limit: int | None = None
    judges: tuple[str, ...] = ()
    journal: Journal = field(default_factory=Journal)
    rank: Rank = field(default_factory=Rank)


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a task measured: its scores, and the per-sample columns from which they are computed.

    count      number of samples: images, questions or queries
    items      columns, [n] or [n, c]. A name may begin with the name of a data set and ":";
               columns of one data set have the same samples and are resampled together
    ratios     score -> the columns of which it is the ratio of sums
    means      score -> the scores of which it is the plain mean
    derived    scores that are other functions of the columns (`cafe.evaluation.scoring`)
    plain      scores that are not functions of columns
    intervals  intervals of plain scores, where the task has them
    ids        ids of the samples, in order; two results can be compared if these are equal
    details    anything else worth keeping, JSON-serialisable
    """

    count: int
    items: dict[str, np.ndarray] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    means: dict[str, tuple[str, ...]] = field(default_factory=dict)
    derived: Derivation | None = None
    plain: Scores = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    ids: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def scores(self) -> Scores:
        """All scores, on the samples as they are (not resampled)."""
        return point_scores(self) | self.plain
