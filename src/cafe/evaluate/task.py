"""What a task is given and what it returns.

A task never sees a model, only what it does. So a test can pass a perfect model or a constant one,
and whatever can be called can be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe.evaluate.scoring import Derivation, Ratio, point_scores
from cafe.metrics import Interval
from cafe.types import Conversation, Example, Image, Scores

if TYPE_CHECKING:
    from jaxtyping import Float

    from cafe.evaluate.teacher_forced import Reading

Encode = Callable[[Sequence[Image | str | Conversation]], "Float[np.ndarray, 'n d']"]
"""Pictures, texts and both together, mixed -> unit embeddings, float32 [n, d], in order."""

Generate = Callable[[Sequence[Conversation], int], list[str]]
"""Conversations and the longest answer in tokens -> greedy answers, in order."""

Read = Callable[[Sequence[Example]], "list[Reading]"]
"""Examples -> their embeddings and what the model makes of their answers, in order."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a task found, and per sample what that was computed from.

    count      samples: pictures, questions, queries
    items      columns, [n] or [n, c]. A name may begin with the name of a data set and ":";
               columns of one data set have the same samples, and are resampled together
    ratios     score -> how it comes from two columns
    means      score -> the scores of which it is the plain mean
    derived    scores that are other functions of the columns (`cafe.evaluate.scoring`)
    plain      scores that no column explains
    intervals  of plain scores, where the task knows one
    ids        of the samples, in order; two results can be compared if these are equal
    details    anything else worth keeping, ready for JSON
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
        """All scores on the samples as they are."""
        return point_scores(self) | self.plain
