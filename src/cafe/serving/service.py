"""What the routes share: engine, limits and metrics, and how a request waits for its results."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel
from starlette.requests import Request

from cafe.serving.content import Reader
from cafe.serving.engine import Call, Engine
from cafe.serving.errors import ApiError
from cafe.serving.fetch import Fetch
from cafe.serving.ignored import IgnoredFields
from cafe.serving.limits import Budget, Limits, Reservation
from cafe.serving.messages import (
    Completion,
    Embedding,
    Prompt,
    RequestKind,
    TokenEmbeddings,
    WorkItem,
)
from cafe.serving.metrics import Metrics
from cafe.serving.middleware import CLEANUP, DEADLINE
from cafe.serving.streams import AnswerStream, as_api_errors
from cafe.types import Conversation, Hit, Message

log = logging.getLogger(__name__)


class SearchFunction(Protocol):
    """A search of an index.

    think      the most tokens of the thoughts after which its images were read, and query images
               are to be read; 0: none
    has_words  whether it can also order by words
    by_tokens  whether it is searched by vectors of tokens
    holds      whether a path, as in hits' metadata, is that of a document with a page in the index
    """

    @property
    def by_tokens(self) -> bool: ...

    @property
    def think(self) -> int: ...

    @property
    def has_words(self) -> bool: ...

    def holds(self, path: str, /) -> bool: ...

    def __call__(
        self, vector: np.ndarray, top: int, where: str | None, words: str | None, /
    ) -> Sequence[Hit]:
        """A query, number of hits, SQL or None, words or None -> hits, best first.

        The query is a unit vector [d], or unit vectors [n, dim] where it is searched `by_tokens`.

        Raises:
            ApiError: bad SQL, or words where there are no texts.
        """
        ...


MAX_FETCHES = 8
"""Maximum number of remote images fetched at the same time."""


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """What a request embedded.

    vectors   float32 [n, d], not normalised
    captions  captions or thoughts that the model wrote for it, None where it wrote none
    tokens    of the inputs, and of the captions or thoughts where there are any
    """

    vectors: np.ndarray
    captions: list[str | None]
    tokens: int


@dataclass(eq=False)
class Service:
    """One served model.

    name     of the model, in requests
    fetch    downloads remote images; None: they are refused
    search   searches an index; None: there is no such route
    """

    name: str
    engine: Engine
    metrics: Metrics
    limits: Limits
    fetch: Fetch | None = None
    search: SearchFunction | None = None
    _pixels: Budget = field(init=False)
    _decoders: ThreadPoolExecutor = field(init=False)
    _workers: ThreadPoolExecutor = field(init=False)
    _fetchers: ThreadPoolExecutor = field(init=False)
    _secret: bytes = field(init=False, repr=False)
    _ignored: IgnoredFields = field(init=False, default_factory=IgnoredFields)
    _said_untrained: bool = field(init=False, default=False)
    _said_tokens: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._pixels = Budget(self.limits.held_pixels, "pixels")
        self._decoders = ThreadPoolExecutor(os.cpu_count() or 1, "decode")
        # Of their own: texts and searches do not wait for images to be decoded.
        self._workers = ThreadPoolExecutor(os.cpu_count() or 1, "work")
        self._fetchers = ThreadPoolExecutor(MAX_FETCHES, "fetch")
        self._secret = secrets.token_bytes(64)

    def accept(self, request: Request, body: BaseModel) -> None:
        """What every route does first with its body: fields that change nothing are named.

        Raises ApiError (404) for the name of another model.
        """
        self._ignored.record(body, request.scope)
        self.check_name(getattr(body, "model", None))

    def check_name(self, name: str | None) -> None:
        """Raises ApiError (404) for the name of another model."""
        if name not in (None, self.name):
            raise ApiError(
                404,
                f"unknown model; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def check_count(self, count: int, param: str) -> None:
        """Raises ApiError (400) when a request has more inputs than the limit."""
        if count > self.limits.inputs:
            raise ApiError.invalid(
                f"{param}: {count:,} exceed the limit of {self.limits.inputs:,}", param
            )

    def reader(self, request: Request) -> Reader:
        """A reader for the content of `request`; what it reserves is released when that ends."""
        share = Reservation(self._pixels)
        request.scope[CLEANUP].callback(share.release)
        return Reader(
            self.limits,
            share,
            None if self.fetch is None else self._fetch_in_thread,
            self._decoders,
            self._owner(request),
        )

    def _owner(self, request: Request) -> bytes:
        """Who sent a request, as its key says: what is kept of an image is kept for its owner.

        Also where no key is required: then keys may be those of a proxy in front of the server.
        """
        key = request.headers.get("authorization", "").encode()
        return hashlib.blake2b(key, key=self._secret).digest()

    async def _fetch_in_thread(self, url: str) -> bytes:
        assert self.fetch is not None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._fetchers, self.fetch, url)

    def submit(self, request: Request, call: Call) -> None:
        """Queue a call; it is cancelled when its request ends. Raises ApiError (429, 503)."""
        self.engine.submit(call)
        request.scope[CLEANUP].callback(self.engine.cancel, call)

    async def results(
        self, request: Request, kind: RequestKind, items: list[WorkItem]
    ) -> list[Any]:
        """Compute one result for each item.

        Raises:
            ApiError: The queue is full, the engine cannot answer, or an item is invalid.
        """
        call = Call(kind, await self._checked_lengths(items))
        self.submit(request, call)
        with as_api_errors():
            return await asyncio.wrap_future(call.future)

    async def counted(
        self, request: Request, kind: RequestKind, items: list[WorkItem]
    ) -> tuple[list[Any], int]:
        """As `results`, and the number of tokens read for them, which the metrics count."""
        found = await self.results(request, kind, items)
        tokens = sum(one.tokens for one in found)
        self.metrics.tokens(tokens)
        return found, tokens

    async def embed(
        self,
        request: Request,
        conversations: Sequence[Conversation],
        *,
        caption: bool = False,
        think: int = 0,
        truncate: bool = False,
    ) -> Embedded:
        """Embed conversations as `CAFe.encode` does, but for their length.

        What is too long is refused, or with `truncate` cut as `CAFe.encode` cuts it. Captions and
        thoughts are decoded in the batches of all requests, a token at a time.

        Raises:
            ApiError: As in `results`; or both caption and think, or too many tokens of a thought.
        """
        self._check_think(caption, think)
        trained = self.engine.model.thinks  # refuses while the model loads, before what follows
        # Late: the server listens before torch is imported. Imported here while the thread that
        # loads the model imports it too, transformers fails.
        import torch

        from cafe.model.captions import (
            CAPTION_TOKENS,
            CAPTION_WEIGHT,
            inputs_and_captions,
            mixed,
        )
        from cafe.model.thoughts import after_thoughts

        nothing: list[str | None] = [None] * len(conversations)
        written, tokens = nothing, 0
        if caption or think:
            longest = think or min(CAPTION_TOKENS, self.limits.new_tokens)
            written, tokens = await self._captions(request, conversations, longest)
        if think:
            conversations = after_thoughts(conversations, written)
            if any(written) and not trained:
                self._warn_untrained()
        mixed_in = written if caption else nothing
        asked = inputs_and_captions(conversations, mixed_in)
        items = [WorkItem(one, number, truncate) for number, one in enumerate(asked)]
        results: list[Embedding]
        results, embed_tokens = await self.counted(request, "embed", items)
        vectors = torch.from_numpy(np.stack([one.vector for one in results]))
        vectors = mixed(vectors, mixed_in, CAPTION_WEIGHT)
        return Embedded(vectors.numpy(), written, tokens + embed_tokens)

    async def token_vectors(
        self, request: Request, conversations: Sequence[Conversation]
    ) -> list[TokenEmbeddings]:
        """A vector for each token, as `CAFe.encode_tokens`.

        Raises:
            ApiError: As in `results`; or the model has no such vectors.
        """
        if self.engine.model.token_width is None:
            raise ApiError.invalid(
                "the model has no token vectors: it was not trained with "
                "objective.multi_vector_weight",
                "task",
            )
        most = self.limits.token_vector_characters
        if sum(len(message.text) for one in conversations for message in one) > most:
            raise ApiError.invalid(
                f"the request's texts exceed {most:,} characters, which is the limit for vectors "
                "of tokens; send fewer inputs at a time",
                "input",
            )
        items = [WorkItem(one, number) for number, one in enumerate(conversations)]
        return (await self.counted(request, "tokens", items))[0]

    def _check_think(self, caption: bool, think: int) -> None:
        """Raises ApiError (400) for a number of tokens that cannot be."""
        if caption and think:
            raise ApiError.invalid(
                "caption and think are two ways to use what the model says; choose one", "think"
            )
        if think > self.limits.new_tokens:
            raise ApiError.invalid(
                f"think: at most {self.limits.new_tokens:,} are allowed", "think"
            )

    def say_tokens(self) -> None:
        """Say once that lists of tokens are read as the model's own."""
        if not self._said_tokens:
            self._said_tokens = True
            log.info(
                "lists of tokens are decoded with the model's own tokenizer; LangChain sends "
                "OpenAI's, unless check_embedding_ctx_length=False"
            )

    def _warn_untrained(self) -> None:
        """Say once that the model was not trained to embed after a thought."""
        from cafe.model.thoughts import UNTRAINED

        if not self._said_untrained:
            self._said_untrained = True
            log.warning("think: %s", UNTRAINED)

    async def _captions(
        self, request: Request, conversations: Sequence[Conversation], longest: int
    ) -> tuple[list[str | None], int]:
        """Captions, None where there is none, and the number of tokens that they took."""
        from cafe.model.captions import caption_request

        captions: list[str | None] = [None] * len(conversations)
        items = [
            WorkItem(Prompt(prompt, longest), number)
            for number, prompt in enumerate(map(caption_request, conversations))
            if prompt is not None
        ]
        if not items:
            return captions, 0
        answers: list[Completion] = await self.results(request, "generate", items)
        for item, answer in zip(items, answers, strict=True):
            captions[item.number] = answer.text or None
            self.metrics.tokens(answer.prompt_tokens, answer.new_tokens)
        return captions, sum(answer.prompt_tokens + answer.new_tokens for answer in answers)

    async def _checked_lengths(self, items: Sequence[WorkItem]) -> list[WorkItem]:
        """Refuse (400) texts beyond the context here, or cut them to a little more than it holds:
        the engine would tokenise all of them, each to its end, while everybody waits.
        """
        model = self.engine.model
        checked: list[WorkItem] = []
        for item in items:
            checked.append(item)
            text = "".join(message.text for message in item.conversation)
            if len(text) <= model.max_tokens:
                continue
            excess = await self.run_in_thread(model.excess, text)
            if excess is not None and item.truncate:
                cut = _first_characters(item.conversation, excess[1])
                checked[-1] = replace(item, content=cut)
            elif excess is not None:
                tokens, characters = excess
                counted = f" (in its first {characters:,} characters)" * (characters < len(text))
                raise ApiError.invalid(
                    f"input {item.number}: {tokens} tokens exceed the model's limit of "
                    f"{model.max_tokens}{counted}",
                    code="context_length_exceeded",
                )
        return checked

    async def stream(self, request: Request, items: Sequence[WorkItem]) -> AnswerStream:
        """Queue prompts whose answers are streamed.

        Raises:
            ApiError: The queue is full, the engine cannot answer, or a prompt is too long.
        """
        stream = AnswerStream(request.scope[DEADLINE])
        for number, item in enumerate(await self._checked_lengths(items)):
            self.submit(request, stream.call(number, item))
        return stream

    async def run_in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function on a thread, so that it does not block the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *arguments)


def _first_characters(conversation: Conversation, count: int) -> Conversation:
    """A conversation with at most so many characters of text, from its beginning."""
    messages: list[Message] = []
    for message in conversation:
        parts = []
        for part in message.content:
            if isinstance(part, str):
                part = part[:count]
                count -= len(part)
            parts.append(part)
        messages.append(replace(message, content=tuple(parts)))
    return tuple(messages)
