"""Several tasks ask a model the same things about the same pictures; it answers each once.

The bundled world's tasks share pictures and captions: their embeddings serve retrieval, MMEB and
the gap, and one description serves CHAIR and THRONE. Only for sets that fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import numpy as np

from cafe.evaluate.calls import Calls
from cafe.evaluate.ranked import content_key
from cafe.evaluate.teacher_forced import Reading
from cafe.types import Conversation, Example, Image

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RememberingCalls:
    """A model's calls; each embedding and each reply is computed once."""

    calls: Calls
    prompt: str = ""
    known: dict[Hashable, Any] = field(default_factory=dict)
    inputs: list[object] = field(default_factory=list)  # alive, as pictures go by identity

    def with_prompt(self, prompt: str) -> Self:
        return replace(self, calls=self.calls.with_prompt(prompt), prompt=prompt)

    def encode(self, inputs: Sequence[Image | str | Conversation]) -> np.ndarray:
        keys = [("encode", self.prompt, content_key(value)) for value in inputs]
        return np.stack(self._all(keys, inputs, self.calls.encode))

    def generate(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        keys = [("generate", max_new_tokens, content_key(value)) for value in conversations]
        return self._all(keys, conversations, lambda new: self.calls.generate(new, max_new_tokens))

    def read(self, examples: Sequence[Example]) -> list[Reading]:
        return self.calls.read(examples)

    def _all(
        self, keys: list[Any], values: Sequence[T], do: Callable[[list[T]], Iterable[Any]]
    ) -> list[Any]:
        new = {key: value for key, value in zip(keys, values, strict=True) if key not in self.known}
        if new:
            self.inputs.extend(new.values())
            self.known.update(zip(new, do(list(new.values())), strict=True))
        return [self.known[key] for key in keys]
