"""The tokens of one answer as text: where it ends, and what of it may be shown already."""

from __future__ import annotations

from collections.abc import Callable

from cafe.serve.work import Answer, Event, FinishReason, Prompt

FIRST_WIDE_SIGN = "\u2e80"
"""From here on scripts write no spaces between words (Chinese, Japanese, Korean signs)."""

UNFINISHED_SIGN = "\ufffd"
"""What a tokenizer writes for a sign of which some bytes are missing."""


class Transcript:
    """One row of a generation.

    decode   token ids -> text, special tokens left out
    limit    longest answer, in tokens
    """

    def __init__(
        self,
        row: int,
        prompt: Prompt,
        decode: Callable[[list[int]], str],
        *,
        end_ids: frozenset[int],
        limit: int,
        prompt_tokens: int,
    ) -> None:
        self._row, self._prompt, self._decode = row, prompt, decode
        self._end_ids, self._limit, self._prompt_tokens = end_ids, limit, prompt_tokens
        self._tokens: list[int] = []
        self._sent = ""
        self._count = 0

    def add(self, token: int) -> Event:
        """One more token; the event holds the answer when it was the last one."""
        self._count += 1
        ended = token in self._end_ids
        if not ended:
            self._tokens.append(token)
        full = self._count >= self._limit
        if not (ended or full or self._prompt.stream or self._prompt.stop):
            return Event(self._row)
        text = self._decode(self._tokens)
        stop = first_stop(text, self._prompt.stop)
        if ended or full or stop is not None:
            return self._last(text[:stop].strip(), "length" if full and not ended else "stop", stop)
        if not self._prompt.stream:
            return Event(self._row)
        shown = settled(text[: len(text) - begun_stop(text, self._prompt.stop)]).strip()
        return Event(self._row, self._piece(shown))

    def _last(self, text: str, reason: FinishReason, stop: int | None) -> Event:
        answer = Answer(
            text, "stop" if stop is not None else reason, self._prompt_tokens, self._count
        )
        return Event(self._row, self._piece(text) if self._prompt.stream else "", answer)

    def _piece(self, shown: str) -> str:
        piece = shown[len(self._sent) :]
        self._sent += piece
        return piece


def first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the first of the stop texts begins."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def begun_stop(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may become a stop text."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )


def settled(text: str) -> str:
    """The part of `text` that later tokens no longer change: all but its last word."""
    if text and FIRST_WIDE_SIGN <= text[-1] != UNFINISHED_SIGN:
        return text
    return text[: max(text.rfind(" "), text.rfind("\n")) + 1]
