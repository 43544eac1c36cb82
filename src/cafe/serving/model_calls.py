"""Runs the engine's batches on the model: the only file of serving that uses its internals.

A text longer than the model's context is refused, while `CAFe.encode` truncates it; unless its
request asks for that, too.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cafe.errors import DataError
from cafe.model.head import token_log_probs
from cafe.model.judging import yes_over_no
from cafe.model.multi_vector import projected, token_projection_of
from cafe.model.prefix_cache import PREFIX_BYTES, PrefixCache
from cafe.model.rerank import trained_temperature
from cafe.model.rows.prompts import trained_thought_tokens
from cafe.model.rows.rows import Rows
from cafe.model.vlm import CAFe
from cafe.serving.constrained import JsonGrammars, JsonMatcher
from cafe.serving.decoding import ChatDecoding
from cafe.serving.messages import Embedding, Score, TokenEmbeddings, WorkItem
from cafe.serving.tools import ToolSupport, tool_support
from cafe.types import Conversation

FIRST_PREFIX = 4
"""The first prefix of a text that is tokenised has this many characters per token of the context;
the next ones are twice as long."""

PREFIX_TOKENS = 64
"""How many tokens fewer the end of a prefix may become when more text follows it."""


class CafeCalls:
    """A `CAFe` as a `cafe.serving.messages.EngineModel`."""

    def __init__(self, model: CAFe, prefix_bytes: int = PREFIX_BYTES) -> None:
        """Create the calls of a model.

        Args:
            model: That is called.
            prefix_bytes: Memory for what was read of images (`cafe.model.prefix_cache`); 0: none.

        Raises:
            CheckpointError: The temperature or thoughts in config.json are invalid.
        """
        self._model = model
        self._collator = replace(model.collator, max_tokens=sys.maxsize)
        self._cutting = model.collator
        self._odds = yes_over_no(model)
        self._projection = token_projection_of(model.model)
        # A copy: tokenizers cannot be configured on one thread while another one uses them.
        backend = getattr(model.processor.tokenizer, "backend_tokenizer", None)
        self._tokenizer = copy.deepcopy(backend)
        if self._tokenizer is not None:
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        end = model.processor.tokenizer.convert_tokens_to_ids(model.collator.pooled_token)
        self._grammars = JsonGrammars(
            model.processor.tokenizer, model.lm_head.out_features, [int(end)]
        )
        self.prefixes = PrefixCache(prefix_bytes) if prefix_bytes else None
        self.dimension = model.embedding_dimension
        self.max_tokens = model.collator.max_tokens
        self.temperature = trained_temperature(model.model.config)
        self.token_width = None if self._projection is None else self._projection.out_features
        self.vocabulary = len(model.processor.tokenizer)
        self.tools: ToolSupport = tool_support(model.processor)
        self.thinks = trained_thought_tokens(model.model.config) > 0

    def excess(self, text: str) -> tuple[int, int] | None:
        """The tokens of a prefix that exceeds the model's limit, and its characters; None: it fits.

        So a text of any length costs about as much as the longest that fits. A text that exceeds
        the limit by few tokens may pass: it is refused with its batch.
        """
        if self._tokenizer is None:
            return None
        size = FIRST_PREFIX * self.max_tokens
        while True:
            # A batch of one: only for batches the tokenizer lets other threads run.
            (tokens,) = self._tokenizer.encode_batch_fast([text[:size]], add_special_tokens=False)
            if len(tokens) > self.max_tokens + PREFIX_TOKENS:
                return len(tokens), min(size, len(text))
            if size >= len(text):
                return None
            size *= 2

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens of the vocabulary, without special ones."""
        tokenizer = self._tokenizer or self._model.processor.tokenizer
        return tokenizer.decode(list(tokens), skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """One token as text, also a special one; a part of a character is U+FFFD."""
        tokenizer = self._model.processor.tokenizer
        decoder = self._tokenizer or tokenizer
        text = decoder.decode([token], skip_special_tokens=False)
        # SentencePiece's decoder drops the space in front of what it takes for a beginning.
        name = str(tokenizer.convert_ids_to_tokens(token))
        return " " + text if name.startswith("\u2581") and not text.startswith(" ") else text

    def tokens_of(self, text: str) -> list[int]:
        """The tokens of a text, without those that begin or end it; special ones are read."""
        if self._tokenizer is None:
            return self._model.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        (encoded,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        return encoded.ids

    def prompt_text(self, conversation: Conversation) -> str:
        """The prompt of a conversation without images, as text. Raises DataError."""
        return self._cutting.render.prompt(conversation).text

    def json_matcher(
        self, schema: dict[str, Any] | None, calls: Mapping[str, dict[str, Any]]
    ) -> JsonMatcher:
        """For answers that are JSON or calls. Raises as `JsonGrammars.matcher`."""
        return self._grammars.matcher(schema, calls)

    def embed(self, items: list[WorkItem]) -> list[Embedding]:
        """Embed conversations.

        Raises:
            DataError: An input is too long or cannot be read; the message gives its number.
        """
        embeddings: dict[int, Embedding] = {}
        for truncate in (False, True):
            chosen = [i for i, item in enumerate(items) if item.truncate is truncate]
            if not chosen:
                continue
            collator = self._cutting if truncate else self._collator
            pooled, counts = self._states(
                [items[i] for i in chosen],
                lambda texts, numbers, c=collator: c.embedding_rows(texts, numbers=numbers),
            )
            vectors = pooled.float().cpu().numpy()
            embeddings |= zip(chosen, map(Embedding, vectors, counts), strict=True)
        return [embeddings[i] for i in range(len(items))]

    @torch.inference_mode()
    def token_vectors(self, items: list[WorkItem]) -> list[TokenEmbeddings]:
        """A vector for each token, as `CAFe.encode_tokens`. Raises as `embed` does."""
        assert self._projection is not None, "the route asks whether there is one"
        conversations, numbers = _named(items)
        collator = replace(self._collator, every_token=True)
        rows, vision = collator.embedding_rows(conversations, numbers=numbers)
        counts = self._checked(rows, items)
        states = self._model.hidden_at(rows, vision, rows.token_vectors_at)
        vectors = functional.normalize(projected(self._projection, states).float(), dim=1).cpu()
        own = vectors.split(rows.token_vector_counts.tolist())
        return [TokenEmbeddings(v.numpy(), count) for v, count in zip(own, counts, strict=True)]

    @torch.inference_mode()
    def score(self, items: list[WorkItem]) -> list[Score]:
        """Score yes/no prompts and answers (`cafe.model.judging`). Raises as `embed` does."""
        scores: dict[int, Score] = {}
        for answered in (False, True):
            chosen = [i for i, item in enumerate(items) if _is_answered(item) is answered]
            if chosen:
                score = self._likelihoods if answered else self._yes_odds
                values, counts = score([items[i] for i in chosen])
                scores |= zip(chosen, map(Score, values, counts), strict=True)
        return [scores[i] for i in range(len(items))]

    def _yes_odds(self, items: list[WorkItem]) -> tuple[list[float], list[int]]:
        pooled, counts = self._states(items, self._collator.prompt_rows)
        return self._odds(pooled).tolist(), counts

    def _likelihoods(self, items: list[WorkItem]) -> tuple[list[float], list[int]]:
        """Log P of the answer that ends each conversation (`cafe.model.judging`), in nats."""
        rows, vision, owner = self._collator.answer_rows(*_named(items))
        counts = self._checked(rows, items)
        states = self._model.hidden_at(rows, vision, rows.label_source)
        log_p, _ = token_log_probs(self._model, states, rows.label_ids)
        return torch.zeros(len(items)).index_add(0, owner, log_p.cpu()).tolist(), counts

    def decoding(self) -> ChatDecoding:
        """Where answers are written."""
        return ChatDecoding(self._model, self.prefixes)

    @torch.inference_mode()
    def _states(
        self, items: list[WorkItem], collate: Callable[..., tuple[Any, dict[str, Tensor]]]
    ) -> tuple[Tensor, list[int]]:
        """Hidden states [n, hidden] at the pooled tokens, and each item's number of tokens."""
        rows, vision = collate(*_named(items))
        counts = self._checked(rows, items)
        return self._model.hidden_at(rows, vision), counts

    def _checked(self, rows: Rows, items: list[WorkItem]) -> list[int]:
        """Each item's number of tokens. Raises DataError for an input that is too long."""
        # Each item has a row of its own, and its last token is the pooled one.
        counts = (rows.pooled % rows.input_ids.shape[1] + 1).tolist()
        for item, count in zip(items, counts, strict=True):
            if count > self.max_tokens:
                raise DataError(
                    f"input {item.number}: {count} tokens exceed the model's limit of "
                    f"{self.max_tokens}"
                )
        return counts


def _is_answered(item: WorkItem) -> bool:
    return _conversation(item)[-1].role == "assistant"


def _named(items: list[WorkItem]) -> tuple[list[Conversation], list[int]]:
    """The conversations, and what messages call them."""
    return [_conversation(item) for item in items], [item.number for item in items]


def _conversation(item: WorkItem) -> Conversation:
    if not isinstance(item.content, tuple):
        raise TypeError("a prompt can be answered, not embedded or scored")
    return item.content
