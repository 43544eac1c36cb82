"""What the routes that generate share: settings, formats and tools of an answer; usage."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cafe.errors import first_line
from cafe.serving.errors import ApiError
from cafe.serving.messages import Completion
from cafe.serving.schema import NamedTool, OfferedTool, ResponseFormat
from cafe.serving.service import Service
from cafe.serving.tools import offering
from cafe.types import Conversation, ToolCall

if TYPE_CHECKING:  # it imports torch
    from cafe.serving.constrained import JsonMatcher


NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""What a tool without `parameters` takes."""


class ToolChoices:
    """The tools of one request, and whether one must be called.

    offered   that the model is told of
    forced    those of which it must call one; empty: it may answer instead
    """

    def __init__(
        self,
        service: Service,
        tools: Sequence[OfferedTool] | None,
        choice: str | NamedTool | None,
    ) -> None:
        """Raises ApiError (400) for tools that the model cannot be offered or made to call."""
        self.offered = [] if choice == "none" else [tool.function for tool in tools or []]
        named = choice.function.name if isinstance(choice, NamedTool) else None
        self.forced = [tool for tool in self.offered if choice == "required" or tool.name == named]
        if not self.forced and (choice == "required" or named is not None):
            what = "there are no tools" if named is None else f"there is no tool {named[:60]!r}"
            raise ApiError.invalid(f"tool_choice: {what}", "tool_choice")
        names = [tool.name for tool in self.offered]
        if len(set(names)) < len(names):
            raise ApiError.invalid("tools: two of them have the same name", "tools")
        support = service.engine.model.tools if self.offered else "calls"
        if support != "calls":
            reason = {
                "none": "the model's chat template has no tools",
                "unread": "the model's chat template writes calls in another form than <tool_call>"
                '{"name": …, "arguments": …}</tool_call> (Hermes, Qwen), which is the one that is '
                "read here",
            }[support]
            raise ApiError.invalid(f"tools: {reason}; use tool_choice none", "tools")

    def told(self, conversation: Conversation) -> Conversation:
        """The conversation after a turn that says which tools there are."""
        if not self.offered:
            return conversation
        tools = [
            {"type": "function", "function": tool.model_dump(exclude_none=True)}
            for tool in self.offered
        ]
        return (offering(tools), *conversation)


async def answer_matcher(
    service: Service, asked: ResponseFormat | None, tools: ToolChoices
) -> JsonMatcher | None:
    """What keeps an answer to its format, or to a call; None: it may be any text.

    Raises ApiError (400) for a schema that cannot be used.
    """
    wants_json = asked is not None and asked.type != "text"
    if not wants_json and not tools.forced:
        return None
    schema: dict[str, Any] | None = None
    if wants_json and not tools.forced:
        schema = {"type": "object"}
        if asked is not None and asked.json_schema is not None:
            schema = asked.json_schema.json_schema or schema
    functions = tools.forced or tools.offered
    calls = {tool.name: tool.parameters or NO_ARGUMENTS for tool in functions}
    param = "tools" if tools.forced else "response_format"
    try:
        return await service.run_in_thread(service.engine.model.json_matcher, schema, calls)
    except ImportError:
        reason = "this server lacks llguidance; install it with pip install 'cafe-vlm[serve]'"
    except ValueError as error:
        reason = first_line(error)
    raise ApiError.invalid(f"{param}: {reason}", param)


def new_tokens(service: Service, asked: int | None, param: str = "max_tokens") -> int:
    """The longest answer. Raises ApiError (400) for more than the limit."""
    limits = service.limits
    if asked is not None and asked > limits.new_tokens:
        raise ApiError.invalid(f"{param}: at most {limits.new_tokens:,} are allowed", param)
    return asked or min(limits.default_new_tokens, limits.new_tokens)


def described_call(call: ToolCall) -> dict[str, Any]:
    """A call in OpenAI's shape."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def usage_of(answers: Sequence[Completion]) -> dict[str, int]:
    """Tokens of the answers to one prompt, which counts once."""
    prompt, new = answers[0].prompt_tokens, sum(answer.new_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
