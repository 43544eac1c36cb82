"""Schemas of `/v1/responses` (OpenAI) and of `/tokenize` and `/detokenize` (vLLM)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from cafe.serving.schema import (
    MAX_TOOLS,
    TEMPLATE,
    ChatMessages,
    FunctionCalled,
    FunctionName,
    JsonSchema,
    Many,
    Neutral,
    OfferedFunction,
    OfferedTool,
    Request,
    Text,
)
from cafe.serving.schema_decisions import DecisionContent


class ResponseMessage(Request):
    """A turn; an earlier answer is one with parts of the type output_text."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: DecisionContent


class CallItem(FunctionCalled):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: Text


class CallOutput(Request):
    """What a tool returned."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Text


class FlatTool(Request):
    """A tool as this route has it: the fields of `OfferedFunction` are not nested."""

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None

    @property
    def nested(self) -> OfferedTool:
        fields = self.model_dump(include={"name", "description", "parameters"})
        return OfferedTool(type="function", function=OfferedFunction(**fields))


class NamedFunctionTool(Request):
    """The tool that must be called."""

    type: Literal["function"]
    name: Text


class TextFormat(JsonSchema):
    """What the answer is: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"


class TextSettings(Request):
    format: TextFormat = TextFormat()


class ResponsesRequest(Request):
    """A response; nothing is stored, so none can be continued by its id."""

    unsupported: ClassVar[Neutral] = {
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "background": (False,),
        "max_tool_calls": (),
        "top_logprobs": (0,),
        "include": ([],),
        "reasoning": ({},),
        "truncation": ("disabled",),
    }

    model: Text | None = None
    input: Text | Many[ResponseMessage | CallItem | CallOutput]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stream: bool = False
    text: TextSettings = TextSettings()
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool = True


class TokenizeRequest(Request):
    """The tokens of a text, or of the prompt that a chat becomes."""

    unsupported: ClassVar[Neutral] = TEMPLATE | {"add_special_tokens": (True, False)}

    model: Text | None = None
    prompt: Text | None = None
    messages: ChatMessages | None = None
    tools: Annotated[list[OfferedTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Request):
    """Tokens of the model's own tokenizer."""

    model: Text | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]


Item = dict[str, Any]
"""One item of a response's output, in OpenAI's shape."""
