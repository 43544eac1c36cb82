"""Schemas of the requests: OpenAI's fields, and those of vLLM's that have a meaning here.

An unknown field is an error, so that it is never silently ignored. Of a few fields that clients
often send, the neutral values are accepted (`n: 1`, `frequency_penalty: 0`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_TOP = 1000
MAX_FIELDS = 100

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


class Request(BaseModel):
    """Base of all request schemas: strict types, no unknown fields; null is a field not given.

    Clients write null for what is not there: OpenAI's sends an answer back with `refusal: null`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        """Each unknown field would be an error of its own."""
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(f"an object has more than {MAX_FIELDS} fields")
        if isinstance(value, dict):
            return {key: given for key, given in value.items() if given is not None}
        return value


class ImageURL(Request):
    """An image.

    url      a data URI ("data:image/png;base64,…"), or a URL where remote images are allowed
    detail   only "auto": the model's processor determines how an image is read
    """

    url: Text
    detail: Literal["auto"] = "auto"


class TextPart(Request):
    type: Literal["text"]
    text: Text


class ImagePart(Request):
    type: Literal["image_url"]
    image_url: ImageURL | Text


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Many[ContentPart]
    name: None = None


ChatMessages = Many[ChatMessage]


class EmbeddingRequest(Request):
    """Texts in `input`, or one conversation or a batch of them in `messages`.

    caption   embed images without words with captions that the model writes, and return these
    think     read their embeddings after what the model says of them, in at most this many tokens,
              and return that
    """

    model: Text | None = None
    input: Text | Many[Text] | Many[int] | Many[Many[int]] | None = None
    messages: ChatMessages | Many[ChatMessages] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    caption: bool | None = False
    think: Annotated[int, Field(ge=0)] | None = 0
    user: Text | None = None

    @field_validator("input")
    @classmethod
    def _no_token_ids(cls, value: Any) -> Any:
        if isinstance(value, list) and not isinstance(value[0], str):
            raise ValueError(
                "token ids are not accepted because the embedding template is applied to text; "
                "send strings (LangChain: check_embedding_ctx_length=False)"
            )
        return value


class StreamOptions(Request):
    include_usage: bool = False


class ChatRequest(Request):
    """A chat; temperature 0, the default, is greedy, as in `CAFe.generate`."""

    model: Text | None = None
    messages: ChatMessages
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
    """A query or document: {"content": […]}, or "text", "image" (a data URI) or both."""

    content: Many[ContentPart] | None = None
    text: Text | None = None
    image: Text | None = None


class RerankRequest(Request):
    """One side has images, the other texts; the relevance is the posterior of `CAFe.rerank`."""

    model: Text | None = None
    query: Text | Content
    documents: Many[Text | Content]
    rerank_by: Literal["question", "likelihood"] = "question"
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True
    user: Text | None = None


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
