"""Streaming detokenization: the tokens of one answer as text, stop texts, and what may be sent."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from cafe.serving.messages import Completion, Event, FinishReason, Prompt, TokenLogProb

FIRST_CJK_CHARACTER = "\u2e80"
"""The first code point of the scripts without spaces between words (Chinese, Japanese, Korean)."""

REPLACEMENT_CHARACTER = "\ufffd"
"""What a tokenizer decodes an incomplete UTF-8 sequence to."""


class StreamDetokenizer:
    """Turns the tokens of one row of a generation into text."""

    def __init__(
        self,
        row: int,
        prompt: Prompt,
        decode: Callable[[list[int]], str],
        *,
        end_ids: frozenset[int],
        limit: int,
        prompt_tokens: int,
        logprobs: list[TokenLogProb] | None = None,
    ) -> None:
        """Create the detokenizer of one row.

        Args:
            row: Index of the row in its batch.
            prompt: The prompt that the row answers.
            decode: Token ids to text, without special tokens.
            end_ids: Tokens that end an answer.
            limit: Longest answer, in tokens.
            prompt_tokens: Number of tokens of the prompt.
            logprobs: Receives those of each token before `add` does; None: not wanted.
        """
        self._row, self._prompt, self._decode = row, prompt, decode
        self._end_ids, self._limit, self._prompt_tokens = end_ids, limit, prompt_tokens
        self._logprobs = logprobs
        self._tokens: list[int] = []
        self._sent = ""
        self._count = 0

    def add(self, token: int) -> Event:
        """Add a token; the event holds the whole answer if this token was the last one."""
        self._count += 1
        ended = token in self._end_ids
        if not ended:
            self._tokens.append(token)
        full = self._count >= self._limit
        if not (ended or full or self._prompt.stream or self._prompt.stop):
            return Event(self._row)
        text = self._decode(self._tokens)
        stop = find_stop(text, self._prompt.stop)
        if ended or full or stop is not None:
            return self._final_event(
                text[:stop].strip(), "length" if full and not ended else "stop", stop
            )
        if not self._prompt.stream:
            return Event(self._row)
        ready = stable_prefix(
            text[: len(text) - partial_stop_length(text, self._prompt.stop)]
        ).strip()
        return Event(self._row, self._piece(ready))

    def _final_event(self, text: str, reason: FinishReason, stop: int | None) -> Event:
        answer = Completion(
            text,
            "stop" if stop is not None else reason,
            self._prompt_tokens,
            self._count,
            None if self._logprobs is None else self._own_logprobs(stop),
        )
        return Event(self._row, self._piece(text) if self._prompt.stream else "", answer)

    def _own_logprobs(self, stop: int | None) -> tuple[TokenLogProb, ...]:
        """Of the answer's tokens: without the one that ends it, and up to the stop text."""
        assert self._logprobs is not None
        count = len(self._tokens)
        if stop is not None:
            count = bisect_left(
                range(count), stop, key=lambda n: len(self._decode(self._tokens[:n]))
            )
        return tuple(self._logprobs[:count])

    def _piece(self, ready: str) -> str:
        """The part of `ready` that has not been sent yet."""
        piece = ready[len(self._sent) :]
        self._sent += piece
        return piece


def find_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Index of the first occurrence of any of the stop texts."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def partial_stop_length(text: str, stops: tuple[str, ...]) -> int:
    """Number of characters at the end of `text` that could be the beginning of a stop text."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )


def stable_prefix(text: str) -> str:
    """The part of `text` that later tokens cannot change: all but its last word."""
    if text and FIRST_CJK_CHARACTER <= text[-1] != REPLACEMENT_CHARACTER:
        return text
    return text[: max(text.rfind(" "), text.rfind("\n")) + 1]
