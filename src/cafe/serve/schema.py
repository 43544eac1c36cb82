"""What requests may say: OpenAI's fields, and those of vLLM's that mean something here.

A field that would be ignored is an error: nobody should believe that it did something. Neutral
values of a few that clients like to send (`n: 1`, `frequency_penalty: 0`) are taken.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

MAX_TOP = 1000

T = TypeVar("T")
# One error is told: a list of a million wrong items must not become a million errors.
Many = Annotated[list[T], Field(min_length=1, fail_fast=True)]


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair is no text") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ImageURL(Request):
    """url: a data URI ("data:image/png;base64,…"), or an address where remote pictures are allowed.

    `detail` is taken and has one value: pictures are read as the model's processor reads them.
    """

    url: Text
    detail: Literal["auto"] = "auto"


class TextPart(Request):
    type: Literal["text"]
    text: Text


class ImagePart(Request):
    type: Literal["image_url"]
    image_url: ImageURL | Text


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Many[Part]
    name: None = None


Conversation = Many[ChatMessage]


class EmbeddingRequest(Request):
    """`input` are texts; `messages` is one conversation or a batch of them."""

    model: Text | None = None
    input: Text | Many[Text] | Many[int] | Many[Many[int]] | None = None
    messages: Conversation | Many[Conversation] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: Text | None = None

    @field_validator("input")
    @classmethod
    def _no_token_ids(cls, value: Any) -> Any:
        if isinstance(value, list) and not isinstance(value[0], str):
            raise ValueError(
                "token ids are not accepted, for the embedding template is made of text; send "
                "strings (LangChain: check_embedding_ctx_length=False)"
            )
        return value


class StreamOptions(Request):
    include_usage: bool = False


class ChatRequest(Request):
    """temperature 0, the default, is greedy, as in `CAFe.generate`."""

    model: Text | None = None
    messages: Conversation
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[Text, Field(min_length=1, max_length=200)]
        | Annotated[list[Annotated[Text, Field(min_length=1, max_length=200)]], Field(max_length=4)]
        | None
    ) = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Text | None = None
    n: Literal[1] | None = 1
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0.0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0.0


class Content(Request):
    """A side of a rerank with a picture: {"content": […]}, {"text": "…"} or {"image": "data:…"}."""

    content: Many[Part] | None = None
    text: Text | None = None
    image: Text | None = None


class RerankRequest(Request):
    """One side holds a picture, the other text: relevance is `CAFe.score`."""

    model: Text | None = None
    query: Text | Content
    documents: Many[Text | Content]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True
    user: Text | None = None


class SearchRequest(Request):
    """By words, by a picture, or by both. `where`: a condition in the index's SQL."""

    query: Text | None = None
    image: Text | None = None
    top: Annotated[int, Field(ge=1, le=MAX_TOP)] = 10
    where: Annotated[Text, Field(max_length=2000)] | None = None


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every refused request is answered with."""

    error: Error
