"""Answers that are JSON, or calls of tools: only tokens that can go on to one are possible.

The grammar and its state are those of llguidance, which follows them token by token, within limits
on work and size, so no schema of a client can hold up the others for long. It has no limit on one
thing, so that is limited here: regular expressions that a text must all fit (`_check_patterns`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from cafe.serving.tools import BEGIN, END

LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write a value: a small model that may write spaces may never stop."""

MAX_STATES = 20_000
"""Of the automaton of one answer; each takes a kilobyte or two."""

STEP_FUEL = 50_000
"""llguidance's unit of work for one token: about four milliseconds."""

MAX_PATTERNS = 8
"""Regular expressions of a schema that has objects to be fitted together. Twenty that one text must
fit take llguidance a minute and three gigabytes, twelve a moment."""


class JsonMatcher:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: Any, size: int, ends: Sequence[int]) -> None:
        """`size` is the number of tokens that the grammar knows, `ends` are those that end."""
        self._matcher, self._size, self._ends = matcher, size, list(ends)

    def copy(self) -> Self:
        """The same place, followed separately."""
        return type(self)(self._matcher.deep_copy(), self._size, self._ends)

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [vocabulary], -inf for tokens that cannot come next.

        After the value, and where the grammar exceeds its limits, only the end can.
        """
        allowed = np.zeros(len(logits), dtype=bool)
        if not (self._matcher.is_stopped() or self._matcher.is_error()):
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            found = np.unpackbits(bits, bitorder="little")[: self._size].astype(bool)
            allowed[: len(found)] = found[: len(allowed)]
        if not allowed.any():
            allowed[self._ends] = True
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """Go on by a token."""
        if not (self._matcher.is_stopped() or self._matcher.is_error()):
            self._matcher.consume_token(token)


class JsonGrammars:
    """Makes the matchers of one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Any, size: int, ends: Sequence[int]) -> None:
        """Create them for a fast tokenizer; see `JsonMatcher`."""
        self._fast, self._size, self._ends = tokenizer, size, ends

    @cached_property
    def _tokenizer(self) -> Any:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self._fast, n_vocab=self._size, eos_token=list(self._ends))

    def matcher(
        self, schema: dict[str, Any] | None, calls: Mapping[str, dict[str, Any]] | None = None
    ) -> JsonMatcher:
        """A matcher for values of a JSON schema, for one call of a tool, or for either.

        Args:
            schema: Of the answer; None: it must be a call.
            calls: Names of tools, with the schemas of their arguments.

        Raises:
            ValueError: A schema is wrong, or uses what llguidance does not support.
            ImportError: llguidance is not installed.
        """
        from llguidance import LLMatcher, LLParserLimits

        _check_patterns([schema, calls])
        limits = LLParserLimits(max_lexer_states=MAX_STATES, step_lexer_fuel=STEP_FUEL)
        grammar = _grammar(schema, calls or {})
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(str(matcher.get_error()))
        return JsonMatcher(matcher, self._size, self._ends)


def _grammar(schema: dict[str, Any] | None, calls: Mapping[str, dict[str, Any]]) -> str:
    """In llguidance's dialect of Lark, where each schema is a grammar by itself."""
    answers = [] if schema is None else ["value"]
    lines = [] if schema is None else [f"value: %json {json.dumps(_laid_out(schema))}"]
    tail = json.dumps("}\n" + END)
    for number, (name, arguments) in enumerate(calls.items()):
        head = f'{BEGIN}\n{{"name": {json.dumps(name)}, "arguments": '
        answers.append(f"call{number}")
        lines += [
            f"call{number}: {json.dumps(head)} arguments{number} {tail}",
            f"arguments{number}: %json {json.dumps(_laid_out(arguments))}",
        ]
    return "\n".join([f"start: {' | '.join(answers)}", *lines])


def _laid_out(schema: dict[str, Any]) -> dict[str, Any]:
    return schema | {"x-guidance": LAYOUT}


def _check_patterns(schema: Any) -> None:
    """Raises ValueError for more regular expressions than may have to be fitted together."""
    patterns, together = 0, False
    waiting: list[Any] = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            patterns += sum(key in value for key in ("pattern", "format", "patternProperties"))
            together |= "allOf" in value or ("$ref" in value and len(value) > 1)
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    if together and patterns > MAX_PATTERNS:
        raise ValueError(
            f"a schema with allOf, or with $ref among other keys, may have at most {MAX_PATTERNS} "
            f"patterns and formats, not {patterns}"
        )
