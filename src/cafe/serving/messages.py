"""Messages exchanged between requests, engine and model: the work, and its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from cafe.types import Conversation, Image

RequestKind = Literal["embed", "score", "generate"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A conversation to be answered.

    temperature   0 is greedy decoding
    top_p         nucleus sampling: sample from the most probable tokens whose probabilities sum to
                  this
    seed          of the sampling; None: a new one each time
    stop          texts that end the answer and are not part of it
    stream        whether pieces of the answer are wanted before its end
    """

    conversation: Conversation
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class WorkItem:
    """One unit of work.

    content   a conversation to embed or score (a yes/no question, or a request with its answer), or
              a prompt to answer
    number    its index in the request, for error messages
    """

    content: Conversation | Prompt
    number: int = 0

    @property
    def conversation(self) -> Conversation:
        return self.content.conversation if isinstance(self.content, Prompt) else self.content

    @property
    def has_image(self) -> bool:
        return any(
            isinstance(part, Image) for message in self.conversation for part in message.content
        )


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """vector: float32 [d], as the model returns it, not normalised."""

    vector: np.ndarray
    tokens: int


@dataclass(frozen=True, slots=True)
class Score:
    """log P(yes) / P(no) of a question; or log P of the answer that ends a conversation."""

    value: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Event:
    """What one decoding step yields for one prompt: a piece of text, its whole answer, or both."""

    row: int
    piece: str = ""
    answer: Completion | None = None


class Decoding(Protocol):
    """Several prompts that are answered together, one token each per step."""

    @property
    def finished(self) -> bool: ...

    def step(self) -> list[Event]:
        """Decode one token of every row. Raises whatever the model raises."""
        ...

    def drop(self, row: int) -> None:
        """Stop decoding this row: its request has been cancelled."""
        ...


class EngineModel(Protocol):
    """The model as the engine uses it: on one thread, one batch at a time, but for `excess`.

    dimension     of the embeddings
    max_tokens    context length
    temperature   that the embeddings were trained with
    thinks        whether it was trained to embed after a thought
    """

    dimension: int
    max_tokens: int
    temperature: float
    thinks: bool

    def excess(self, text: str) -> tuple[int, int] | None:
        """The tokens of a prefix that exceeds the context, and its characters; None: it fits.

        Called on any thread, also while a batch is computed.
        """
        ...

    def embed(self, items: list[WorkItem]) -> list[Embedding]: ...

    def score(self, items: list[WorkItem]) -> list[Score]: ...

    def generate(self, items: list[WorkItem]) -> Decoding: ...
