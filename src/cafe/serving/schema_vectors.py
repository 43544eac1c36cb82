"""Schemas of requests for vectors and scores, each in the shapes of several makers' clients.

OpenAI, vLLM, Jina and infinity (embeddings), Cohere (`/v2/embed`), Text Embeddings Inference, TEI
(`/embed`, `/embed_all`, `/rerank`), vLLM (`/pooling`, `/score`), Cohere and Jina (`/v1/rerank`).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import AliasChoices, Field, model_validator
from pydantic_core import PydanticCustomError

from cafe.serving.schema import (
    TEMPLATE,
    ChatMessages,
    Content,
    ContentPart,
    Many,
    Neutral,
    Request,
    Text,
)

NumberType = Literal["float", "int8", "uint8", "binary", "ubinary"]
"""How the numbers of a vector are sent (`cafe.serving.vectors`)."""

Tokens = Many[Annotated[int, Field(ge=0)]]
EmbedInputs = Text | Content | Many[Text | Content] | Tokens | Many[Tokens]
Dimensions = Annotated[int, Field(ge=1)]

CUTTING: Neutral = {
    "max_tokens_per_query": (),
    "max_tokens_per_doc": (),
    "max_chunks_per_doc": (1,),
    "rank_fields": (["text"],),
    "raw_scores": (False,),
    "label_token_ids": (),
}
"""Fields of rerankers and scores that would change what is read, or what the numbers mean."""

VLLM: Neutral = TEMPLATE | {
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "use_activation": (True,),
    "truncation_side": ("right",),
    "late_chunking": (False,),
    "return_multivector": (False,),
}


class EmbeddingRequest(Request):
    """Inputs in `input`, or one conversation or a batch of them in `messages`.

    input             texts; lists of tokens of the model's own tokenizer; or objects with a text,
                      an image or both
    modality          "image": the strings of `input` are images, as data URIs
    instruction       becomes a system turn before each input
    output_dtype      of the numbers; also as `embedding_types` (one) or `embedding_type`, where
                      "base64" is the encoding of floats
    truncate_prompt_tokens  -1 cuts the end of texts that are longer than the model reads
    caption           embed images without words with captions that the model writes, and return
                      these
    think             read their embeddings after what the model says of them, in at most this many
                      tokens, and return that
    """

    unsupported: ClassVar[Neutral] = VLLM

    model: Text | None = None
    input: EmbedInputs | None = None
    messages: ChatMessages | Many[ChatMessages] | None = None
    modality: Literal["text", "image"] = "text"
    instruction: Text | None = None
    dimensions: Annotated[
        Dimensions | None,
        Field(validation_alias=AliasChoices("dimensions", "output_dimension")),
    ] = None
    encoding_format: Literal["float", "base64"] = "float"
    output_dtype: Annotated[
        NumberType | Literal["base64"] | None,
        Field(validation_alias=AliasChoices("output_dtype", "embedding_type")),
    ] = None
    embedding_types: (
        Annotated[list[NumberType | Literal["base64"]], Field(min_length=1, max_length=1)] | None
    ) = None
    truncate_prompt_tokens: Literal[-1] | None = None
    caption: bool | None = False
    think: Annotated[int, Field(ge=0)] | None = 0

    @property
    def numbers(self) -> tuple[NumberType, bool]:
        """The type of the numbers, and whether they are sent as base64."""
        asked: NumberType | Literal["base64"] | None = self.output_dtype
        if self.embedding_types:
            asked = self.embedding_types[0]
        as_base64 = self.encoding_format == "base64" or asked == "base64"
        if asked is None or asked == "base64":
            return "float", as_base64
        return asked, as_base64


class PoolingRequest(Request):
    """As for embeddings.

    task   "token_embed": a vector for each token; "embed": one for each input. Without it: the
           first where the model has such vectors, else the second
    """

    unsupported: ClassVar[Neutral] = VLLM | {"dimensions": ()}

    model: Text | None = None
    input: EmbedInputs | None = None
    messages: ChatMessages | Many[ChatMessages] | None = None
    task: Literal["token_embed", "embed"] | None = None
    encoding_format: Literal["float", "base64"] = "float"


class CohereInput(Request):
    """Texts and images that are embedded together."""

    content: Text | Many[ContentPart]


class CohereEmbedRequest(Request):
    """One of `texts`, `images` (data URIs) and `inputs`.

    embedding_types   of the numbers; each is a list in the answer
    truncate          END cuts the end of a text that is longer than the model reads; NONE refuses
                      it
    """

    unsupported: ClassVar[Neutral] = {"max_tokens": ()}

    model: Text | None = None
    texts: Many[Text] | None = None
    images: Many[Text] | None = None
    inputs: Many[CohereInput] | None = None
    output_dimension: Dimensions | None = None
    embedding_types: (
        Annotated[list[NumberType | Literal["base64"]], Field(min_length=1, max_length=6)] | None
    ) = None
    truncate: Literal["END", "NONE"] = "END"


class TeiEmbedRequest(Request):
    """Texts, or lists of tokens of the model's own tokenizer, as Text Embeddings Inference has it.

    normalize   vectors of length 1
    truncate    cut the end of a text that is longer than the model reads
    """

    unsupported: ClassVar[Neutral] = {
        "truncation_direction": ("right", "Right"),
        "prompt_name": (),
    }

    inputs: Text | Many[Text] | Tokens | Many[Tokens]
    normalize: bool = True
    truncate: bool = False
    dimensions: Dimensions | None = None


class RerankRequest(Request):
    """Documents, or TEI's `texts`; the relevance is the posterior of `CAFe.rerank`.

    instruction   becomes a system turn before the query and before each question
    top_n         0: all
    return_text   TEI's name for `return_documents`
    """

    unsupported: ClassVar[Neutral] = CUTTING

    model: Text | None = None
    query: Text | Content
    documents: Many[Text | Content] | None = None
    texts: Many[Text] | None = None
    instruction: Annotated[
        Text | None, Field(validation_alias=AliasChoices("instruction", "instruct"))
    ] = None
    rerank_by: Literal["question", "likelihood"] = "question"
    top_n: Annotated[int, Field(ge=0)] | None = None
    return_documents: bool = True
    return_text: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.documents is None and self.texts is None:
            raise PydanticCustomError("missing_field", "missing", {"field": "documents"})
        if self.documents is not None and self.texts is not None:
            raise ValueError("give documents or texts, not both")
        return self


class ScoreRequest(Request):
    """One query and N documents, or N of each; vLLM has several names for both sides."""

    unsupported: ClassVar[Neutral] = CUTTING

    model: Text | None = None
    queries: Annotated[
        Text | Content | Many[Text | Content],
        Field(validation_alias=AliasChoices("queries", "text_1", "data_1")),
    ]
    documents: Annotated[
        Text | Content | Many[Text | Content],
        Field(validation_alias=AliasChoices("documents", "items", "text_2", "data_2")),
    ]
    instruction: Annotated[
        Text | None, Field(validation_alias=AliasChoices("instruction", "instruct"))
    ] = None
