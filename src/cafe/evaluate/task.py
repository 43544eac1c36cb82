"""What a task is given and what it returns.

A task never sees a model, only what it does. So a test can pass a perfect model or a constant one,
and whatever can be called can be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cafe.types import Conversation, Example, Image, Scores

if TYPE_CHECKING:
    from jaxtyping import Float

    from cafe.evaluate.teacher_forced import Reading

Encode = Callable[[Sequence[Image | str]], "Float[np.ndarray, 'n d']"]
"""Pictures and texts, mixed -> unit embeddings, float32 [n, d], in order."""

Generate = Callable[[Sequence[Conversation], int], list[str]]
"""Conversations and the longest answer in tokens -> greedy answers, in order."""

Read = Callable[[Sequence[Example]], "list[Reading]"]
"""Examples -> their embeddings and what the model makes of their answers, in order."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a task found.

    scores  name -> number
    count   samples: pictures, or questions
    items   name -> per sample, what the scores are means of or were counted from
    """

    scores: Scores
    count: int
    items: dict[str, np.ndarray] = field(default_factory=dict)
