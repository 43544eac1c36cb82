"""Tools in conversations: what a model may call, its calls, and what they return.

A record of OpenAI's and TRL's layout; `tools` and `arguments` may also be JSON in a string:

    {"tools": [{"type": "function", "function": {"name": "weather", "parameters": {…}}}],
     "messages": [
        {"role": "user", "content": "How warm is it in Paris?"},
        {"role": "assistant", "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]},
        {"role": "tool", "content": "22 degrees"},
        {"role": "assistant", "content": "It is 22 degrees in Paris."}]}

ms-swift and LLaMA-Factory write a call as a turn of its own (`tool_call`, `function_call`) whose
text is {"name": …, "arguments": {…}}, and what it returns as `tool_response` or `observation`.
Formats: https://huggingface.co/docs/trl/dataset_formats#tool-calling,
https://swift.readthedocs.io/en/latest/Instruction/Agent-support.html.
"""

from __future__ import annotations

import json
from typing import Any

from cafe.data.records import Record, kind
from cafe.errors import DataError, check_unicode, quoted
from cafe.types import Conversation, Message, ToolCall

CALLS = ("tool_call", "function_call")
RESULTS = ("tool", "tool_response", "observation", "function")


def offered_tools(record: Record) -> Conversation:
    """The turn that says which tools there are; none where the record has no `tools`.

    Raises:
        DataError: `tools` is no list of tools with names.
    """
    tools = _from_json(record.get("tools"), "'tools'")
    if tools in (None, [], ""):
        return ()
    if not isinstance(tools, list):
        raise DataError(f"'tools' is {kind(tools)}, expected a list of descriptions of tools")
    for tool in tools:
        _function(tool, "'tools'")
    return (Message("tools", (_as_json(tools),)),)


def read_calls(value: Any, location: str) -> tuple[ToolCall, ...]:
    """The calls of an assistant turn: a list of them or one, or that as JSON.

    Raises:
        DataError: A call has no name, or its arguments are no object.
    """
    value = _from_json(value, location)
    return tuple(_call(each, location) for each in (value if isinstance(value, list) else [value]))


def _call(value: Any, location: str) -> ToolCall:
    name, call = _function(value, location)
    arguments = _from_json(call.get("arguments") or {}, f"{location}: arguments of {name}")
    if not isinstance(arguments, dict):
        raise DataError(f"{location}: arguments of {name}: {kind(arguments)}, expected an object")
    return ToolCall(name, _as_json(arguments))


def _function(value: Any, location: str) -> tuple[str, dict[str, Any]]:
    """Name and description of a tool, or of a call: in `function`, or as it is."""
    function = value.get("function", value) if isinstance(value, dict) else value
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise DataError(f"{location}: a tool is {quoted(value)}, expected an object with a name")
    return name, function


def _from_json(value: Any, what: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError as error:
        raise DataError(f"{what}: {quoted(value)} is not JSON ({error})") from error


def _as_json(value: Any) -> str:
    text = json.dumps(_without_nulls(value), ensure_ascii=False)
    check_unicode(text)
    return text


def _without_nulls(value: Any) -> Any:
    """Without null keys: in a table of Parquet, each object has the keys of all of them."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
