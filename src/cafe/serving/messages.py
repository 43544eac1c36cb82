"""Messages exchanged between requests, engine and model: the work, and its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from cafe.types import Conversation, Image

if TYPE_CHECKING:  # it imports torch
    from cafe.serving.constrained import JsonMatcher
    from cafe.serving.tools import ToolSupport

RequestKind = Literal["embed", "tokens", "score", "generate"]
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
    top_k         sample from this many tokens; 0: from all
    frequency     taken from a token's logit for each time that it is in the answer already
    presence      taken from it if it is there at all
    bias          added to the logits of these tokens
    logprobs      number of tokens whose log-probabilities are wanted, at every place of the answer,
                  beside its own token's; None: no log-probabilities
    matcher       at the beginning of the JSON that the answer must be; None: any text
    """

    conversation: Conversation
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    top_k: int = 0
    frequency: float = 0.0
    presence: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    matcher: JsonMatcher | None = None


@dataclass(frozen=True, slots=True, eq=False)
class WorkItem:
    """One unit of work.

    content   a conversation to embed or score (a yes/no question, or a request with its answer), or
              a prompt to answer
    number    its index in the request, for error messages
    truncate  cut the end of a text that is too long to be embedded, instead of refusing it
    """

    content: Conversation | Prompt
    number: int = 0
    truncate: bool = False

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


@dataclass(frozen=True, slots=True, eq=False)
class TokenEmbeddings:
    """vectors: float32 [tokens, d], of length 1."""

    vectors: np.ndarray
    tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogProb:
    """A token of an answer, its log-probability, and the most probable tokens at its place."""

    token: int
    value: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """log P(yes) / P(no) of a question; or log P of the answer that ends a conversation."""

    value: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer; `logprobs` of its tokens where they were asked for."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    new_tokens: int
    logprobs: tuple[TokenLogProb, ...] | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """What one decoding step yields for one answer: a piece of text, its whole text, or both; or
    the error that ended it.
    """

    row: int
    piece: str = ""
    answer: Completion | None = None
    error: BaseException | None = None


class Decoding(Protocol):
    """Prompts that are answered together, one token each per step; they come and go."""

    def admit(self, items: Mapping[int, WorkItem]) -> list[Event]:
        """Read prompts, by the numbers that events will have, and write their first tokens.

        Raises whatever the model raises; then none of them has been admitted.
        """
        ...

    def step(self) -> list[Event]:
        """Write one token of every answer. Raises whatever the model raises."""
        ...

    def drop(self, row: int) -> None:
        """Write no more of this answer: its request has been cancelled."""
        ...


class PrefixUse(Protocol):
    """How the prefix cache is used. hits, misses: of prompts with images."""

    bytes: int
    hits: int
    misses: int


class EngineModel(Protocol):
    """The model as the engine uses it: on one thread, one batch at a time, but for `excess`.

    dimension     of the embeddings
    max_tokens    context length
    temperature   that the embeddings were trained with
    thinks        whether it was trained to embed after a thought
    token_width   dimension of the vectors of tokens; None: it has none
    vocabulary    number of tokens
    tools         what its chat template makes of tools
    prefixes      the prefix cache; None: there is none
    """

    dimension: int
    max_tokens: int
    temperature: float
    thinks: bool
    token_width: int | None
    vocabulary: int
    tools: ToolSupport

    @property
    def prefixes(self) -> PrefixUse | None: ...

    def excess(self, text: str) -> tuple[int, int] | None:
        """The tokens of a prefix that exceeds the context, and its characters; None: it fits.

        Called on any thread, also while a batch is computed.
        """
        ...

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens of the vocabulary, without special ones. Called on any thread."""
        ...

    def token_text(self, token: int) -> str:
        """One token as text, also a special one. Called on any thread."""
        ...

    def tokens_of(self, text: str) -> list[int]:
        """The tokens of a text, without those that begin or end it. Called on any thread."""
        ...

    def prompt_text(self, conversation: Conversation) -> str:
        """The prompt of a conversation without images, as text. Called on any thread."""
        ...

    def json_matcher(
        self, schema: dict[str, Any] | None, calls: Mapping[str, dict[str, Any]]
    ) -> JsonMatcher:
        """For answers that are JSON of a schema, or a call of a tool. Called on any thread.

        Args:
            schema: Of the answer; None: it must be a call.
            calls: Names of tools, with the schemas of their arguments.

        Raises:
            ValueError: The schema cannot be used.
            ImportError: llguidance is not installed.
        """
        ...

    def embed(self, items: list[WorkItem]) -> list[Embedding]: ...

    def token_vectors(self, items: list[WorkItem]) -> list[TokenEmbeddings]: ...

    def score(self, items: list[WorkItem]) -> list[Score]: ...

    def decoding(self) -> Decoding:
        """Where answers are written; the engine asks for one."""
        ...
