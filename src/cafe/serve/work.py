"""The words between requests, engine and model: what is asked, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from cafe.types import Conversation, Image

Kind = Literal["embed", "score", "generate"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A conversation that waits for an answer.

    temperature   0 is greedy
    top_p         sample from the likeliest tokens that hold this much probability
    seed          of the sampling; None: a new one each time
    stop          texts that end the answer and are no part of it
    stream        whether pieces are wanted before the end
    """

    conversation: Conversation
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One unit of work. `number`: what its request calls it, for errors."""

    content: Conversation | Prompt
    number: int = 0

    @property
    def pictured(self) -> bool:
        content = self.content
        conversation = content.conversation if isinstance(content, Prompt) else content
        return any(isinstance(part, Image) for message in conversation for part in message.content)


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """vector: float32 [d], as the model gives it, not normalised."""

    vector: np.ndarray
    tokens: int


@dataclass(frozen=True, slots=True)
class Score:
    """The probability that a picture shows what a text says."""

    score: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Event:
    """What one decoding step means for one prompt: a piece of text, its whole answer, or both."""

    row: int
    piece: str = ""
    answer: Answer | None = None


class Decoding(Protocol):
    """Several prompts that are answered together, a token each with every step."""

    @property
    def finished(self) -> bool: ...

    def step(self) -> list[Event]:
        """Decode one token of every row. Raises what the model raises."""
        ...

    def drop(self, row: int) -> None:
        """Nobody waits for this row any more."""
        ...


class ModelCalls(Protocol):
    """The model as the engine uses it: on one thread, a batch at a time."""

    dimension: int
    max_tokens: int

    def embed(self, items: list[Item]) -> list[Embedding]: ...

    def score(self, items: list[Item]) -> list[Score]: ...

    def generate(self, items: list[Item]) -> Decoding: ...
