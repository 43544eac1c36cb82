"""Schemas of requests: what every body has in common, chats, searches and errors.

Clients of all makers send more than a server needs. A field that is unknown here changes nothing,
and is accepted: the log and a header name it (`cafe.serving.ignored`). A field that would change
the answer, and is not supported, is an error: `Request.unsupported` lists those fields, each with
the values that ask for nothing.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_TOP = 1000
MAX_FIELDS = 100
MAX_CHOICES = 16
MAX_BIASES = 1024
MAX_TOOLS = 128

T = TypeVar("T")
# Validation stops at the first error: a list of a million wrong items must not become a million
# errors.
Many = Annotated[list[T], Field(min_length=1, fail_fast=True)]


def _check_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("text contains an unpaired surrogate") from None
    return text


Text = Annotated[str, AfterValidator(_check_surrogates)]
Neutral = dict[str, tuple[Any, ...]]
"""Names of fields that are not supported, with the values of each that ask for nothing."""

TEMPLATE: Neutral = {
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "add_special_tokens": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
"""vLLM's fields that change how a conversation is written; of chats."""


class Request(BaseModel):
    """Base of all request schemas: strict types; null is a field not given.

    Clients write null for what is not there: OpenAI's sends an answer back with `refusal: null`.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    unsupported: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _given_fields(cls, value: Any) -> Any:
        """The fields that are given and ask for something."""
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:
            raise ValueError(f"an object has more than {MAX_FIELDS} fields")
        given = {key: one for key, one in value.items() if one is not None}
        for name, neutral in cls.unsupported.items():
            if name in given and given.pop(name) not in neutral:
                raise unsupported(name, neutral)
        return given


def unsupported(name: str, neutral: tuple[Any, ...] = ()) -> PydanticCustomError:
    """The error of a field that would change the answer; `cafe.serving.invalid` words it."""
    return PydanticCustomError(
        "unsupported_field",
        "not supported",
        {"field": name, "neutral": [json.dumps(value) for value in neutral]},
    )


class ImageURL(Request):
    """An image.

    url      a data URI ("data:image/png;base64,…"), or a URL where remote images are allowed
    detail   "low" reads the image at 512 x 512 pixels at most; all others as the model's processor
             reads it
    """

    url: Text
    detail: Literal["auto", "low", "high", "original"] = "auto"


class TextPart(Request):
    type: Literal["text"]
    text: Text


class ImagePart(Request):
    type: Literal["image_url"]
    image_url: ImageURL | Text


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class FunctionCalled(Request):
    """The function of an earlier tool call; `arguments` is a JSON object, as a string."""

    name: Text
    arguments: Text = "{}"

    @model_validator(mode="after")
    def _arguments(self) -> Self:
        try:
            value = json.loads(self.arguments)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ValueError("the arguments of a tool call must be a JSON object, as a string")
        return self


class ToolCalled(Request):
    """A tool call in an earlier answer; `id` is not shown to the model."""

    type: Literal["function"] = "function"
    id: Text | None = None
    function: FunctionCalled


class ChatMessage(Request):
    """One turn. Only an assistant's may have no content: it may consist of calls of tools."""

    unsupported: ClassVar[Neutral] = {"audio": (), "function_call": ()}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Many[ContentPart] | None = None
    tool_calls: Annotated[list[ToolCalled], Field(max_length=100)] | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="after")
    def _content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing_field", "missing", {"field": "content"})
        if self.tool_calls and self.role != "assistant":
            raise unsupported("tool_calls", ([],))
        return self


ChatMessages = Many[ChatMessage]


class StreamOptions(Request):
    include_usage: bool = False


StopText = Annotated[Text, Field(min_length=1, max_length=200)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class JsonSchema(Request):
    """A schema that the answer must fit; `strict` or not, it does."""

    name: Text | None = None
    description: Text | None = None
    strict: bool | None = None
    json_schema: Annotated[
        dict[str, Any] | None, Field(validation_alias=AliasChoices("schema", "json_schema"))
    ] = None


class ResponseFormat(Request):
    """What an answer is: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise PydanticCustomError("missing_field", "missing", {"field": "json_schema"})
        return self


FunctionName = Annotated[Text, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class OfferedFunction(Request):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None


class OfferedTool(Request):
    type: Literal["function"]
    function: OfferedFunction


class NamedFunction(Request):
    name: Text


class NamedTool(Request):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Request):
    """A chat; temperature 0, the default, is greedy, as in `CAFe.generate`.

    n                   answers; with `seed`, the i-th has seed + i
    frequency_penalty   taken from a token's logit for each time that the answer has it already
    presence_penalty    taken from it once
    logit_bias          added to the logits of tokens, by their ids
    logprobs            also return log-probabilities, of the model's own distribution: before
                        temperature, penalties and biases
    top_k               sample from this many tokens only; 0 or -1: from all
    parallel_tool_calls  false: the first call of an answer counts
    """

    unsupported: ClassVar[Neutral] = TEMPLATE | {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "structured_outputs": ({},),
        **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ()),
        "modalities": (["text"], []),
        "audio": (),
        "web_search_options": (),
        "repetition_penalty": (1,),
        "length_penalty": (1,),
        "min_p": (0,),
        "min_tokens": (0,),
        "best_of": (1,),
        "use_beam_search": (False,),
        "ignore_eos": (False,),
        "stop_token_ids": ([],),
        "bad_words": ([],),
        "allowed_token_ids": (),
        "include_stop_str_in_output": (False,),
        "skip_special_tokens": (True,),
        "echo": (False,),
        "prompt_logprobs": (),
        "return_token_ids": (False,),
    }

    model: Text | None = None
    messages: ChatMessages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern="^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    logprobs: bool = False
    response_format: ResponseFormat | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[OfferedTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class Content(Request):
    """An input, a query or a document: {"content": […]}; or "text", "image" or both.

    Or a part of a chat by itself: {"type": "image_url", "image_url": …}, {"type": "text", …}.
    """

    unsupported: ClassVar[Neutral] = dict.fromkeys(
        ("video", "video_url", "audio", "audio_url", "input_audio", "file", "pdf"), ()
    )

    type: Literal["text", "image_url", "image"] | None = None
    content: Text | Many[ContentPart] | None = None
    text: Text | None = None
    image: Text | None = None
    image_url: ImageURL | Text | None = None


class SearchRequest(Request):
    """Search by text, by an image, or by both.

    where     as `cafe.index.condition` reads it
    caption   embed an image without words with a caption that the model writes
    think     read its embedding after what the model says of it, in at most this many tokens; null:
              as the images of the index were read, or not at all with caption
    hybrid    order by the words of the query in texts, captions and thoughts as well
    """

    query: Text | None = None
    image: Text | None = None
    top: Annotated[int, Field(ge=1, le=MAX_TOP)] = 10
    where: Annotated[Text, Field(max_length=2000)] | None = None
    caption: bool | None = False
    think: Annotated[int, Field(ge=0)] | None = None
    hybrid: bool | None = False


class Error(BaseModel):
    """An error, as OpenAI reports it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: Error
