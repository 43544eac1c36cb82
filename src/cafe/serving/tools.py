"""Tools that a chat offers: into the conversation, and the model's calls of them out of its answer.

The model's own chat template writes which tools there are, and what a call looks like. Calls are
read in one common form, that of Hermes and Qwen, and only of a model whose template writes them in
it (`tool_support`):

    <tool_call>
    {"name": "weather", "arguments": {"city": "Rome"}}
    </tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from cafe.errors import CafeError
from cafe.types import Message, ToolCall

BEGIN, END = "<tool_call>", "</tool_call>"

ToolSupport = Literal["none", "unread", "calls"]
"""Of a chat template: it has no tools; it writes calls in another form than ours; or in ours."""

_PROBE = {
    "type": "function",
    "function": {
        "name": "probe_of_tools",
        "description": "",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
    },
}


def tool_support(processor: Any) -> ToolSupport:
    """What a model's chat template makes of tools, found by rendering one and a call of it."""
    from cafe.model.rows.template import render_chat  # late: it loads torch

    call = {"name": "probe_of_tools", "arguments": {"x": 1}}
    asked = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    called = {
        "role": "assistant",
        "content": [{"type": "text", "text": ""}],
        "tool_calls": [{"type": "function", "function": call}],
    }
    try:
        offered = render_chat(processor, [asked], tools=[_PROBE], add_generation_prompt=True)
        if "probe_of_tools" not in offered:
            return "none"
        written = render_chat(processor, [asked, called], tools=None)
    except CafeError:
        return "none"
    _, calls = read_calls(written)
    return "calls" if calls == [ToolCall("probe_of_tools", '{"x": 1}')] else "unread"


def offering(tools: Sequence[dict[str, Any]]) -> Message:
    """The turn that says which tools there are, as JSON in OpenAI's shape."""
    return Message("tools", (json.dumps(list(tools), ensure_ascii=False),))


class CallReader:
    """Tells calls from text in an answer that comes in pieces; text in between stays text."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, piece: str) -> Iterator[str | ToolCall]:
        """The texts and calls that are certain after another piece.

        What may be the beginning of a call is held back, and so is white space, which belongs to
        the answer only if more text follows it.
        """
        self._held += piece
        while True:
            begin = self._held.find(BEGIN)
            if begin < 0:
                break
            text = self._held[:begin].rstrip()
            if text:
                yield text
                self._held = self._held[len(text) :]
                begin -= len(text)
            end = self._held.find(END, begin)
            if end < 0:
                return
            call = _call(self._held[begin + len(BEGIN) : end])
            block, self._held = self._held[: end + len(END)], self._held[end + len(END) :]
            yield call or block
        sure = self._held[: len(self._held) - _partial(self._held)].rstrip()
        if sure:
            yield sure
            self._held = self._held[len(sure) :]

    def end(self) -> str:
        """What was held back and turned out to be text."""
        text, self._held = self._held, ""
        return text.rstrip()


def read_calls(text: str) -> tuple[str, list[ToolCall]]:
    """An answer's text without its calls, and these; what is no call in our form stays text."""
    reader = CallReader()
    found = [*reader.feed(text), reader.end()]
    calls = [one for one in found if isinstance(one, ToolCall)]
    return "".join(one for one in found if isinstance(one, str)).strip(), calls


def _call(block: str) -> ToolCall | None:
    """The call that stands between the marks; None: it is not one."""
    try:
        value = json.loads(block)
        arguments = value.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if isinstance(value["name"], str) and isinstance(arguments, dict):
            return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))
    except (ValueError, KeyError, AttributeError, RecursionError):
        pass
    return None


def _partial(text: str) -> int:
    """Number of characters at the end of `text` that could begin a call."""
    lengths = range(min(len(BEGIN) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(BEGIN[:n])), 0)
