"""What is wrong with a body is said in one sentence of ours, without pydantic's types."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from cafe.serving import schema, schema_vectors
from cafe.serving.errors import ApiError
from cafe.serving.invalid import as_api_error

CHAT = {"messages": [{"role": "user", "content": "a"}]}


def refusal(name: str, body: Any) -> ApiError:
    """The error of a body that `cafe.serving.schema` refuses, located as FastAPI locates it."""
    with pytest.raises(pydantic.ValidationError) as caught:
        (vars(schema) | vars(schema_vectors))[name].model_validate(body)
    return as_api_error([each | {"loc": ("body", *each["loc"])} for each in caught.value.errors()])


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        # limits of length
        (
            "SearchRequest",
            {"query": "a", "where": "x" * 2001},
            "where: at most 2,000 characters are allowed, not 2,001",
        ),
        (
            "ChatRequest",
            CHAT | {"stop": "x" * 201},
            "stop: at most 200 characters are allowed, not 201",
        ),
        (
            "ChatRequest",
            CHAT | {"stop": ["a", "x" * 300]},
            "stop.1: at most 200 characters are allowed, not 300",
        ),
        ("ChatRequest", CHAT | {"stop": ""}, "stop: needs at least one character"),
        ("ChatRequest", CHAT | {"stop": ["a"] * 5}, "stop: at most 4 items are allowed, not 5"),
        ("ChatRequest", {"messages": []}, "messages: needs at least one item"),
        ("EmbeddingRequest", {"input": []}, "input: needs at least one item"),
        ("EmbeddingRequest", {"messages": [[]]}, "messages.0: needs at least one item"),
        ("RerankRequest", {"query": "a", "documents": []}, "documents: needs at least one item"),
        # limits of numbers
        ("SearchRequest", {"query": "a", "top": 0}, "top: must be at least 1"),
        ("SearchRequest", {"query": "a", "top": 1001}, "top: must be at most 1,000"),
        ("EmbeddingRequest", {"input": "a", "dimensions": 0}, "dimensions: must be at least 1"),
        ("ChatRequest", CHAT | {"max_tokens": 0}, "max_tokens: must be at least 1"),
        ("ChatRequest", CHAT | {"temperature": 2.5}, "temperature: must be at most 2"),
        ("ChatRequest", CHAT | {"top_p": -0.5}, "top_p: must be at least 0"),
        ("ChatRequest", CHAT | {"seed": 2**63}, "seed: must be below 9,223,372,036,854,775,808"),
        # kinds of values
        ("SearchRequest", {"query": "a", "top": "3"}, "top: must be an integer"),
        ("SearchRequest", {"query": 3}, "query: must be a string"),
        ("SearchRequest", {"query": "a", "caption": "x"}, "caption: must be true or false"),
        ("SearchRequest", [], "the body must be an object"),
        ("EmbeddingRequest", {"input": 5}, "input: must be a string, an object or a list"),
        ("EmbeddingRequest", {"input": ["a", 5]}, "input.1: must be a string or an object"),
        (
            "EmbeddingRequest",
            {"input": "a", "encoding_format": "x"},
            "encoding_format: must be 'float' or 'base64'",
        ),
        ("ChatRequest", CHAT | {"temperature": "hot"}, "temperature: must be a number"),
        ("ChatRequest", CHAT | {"n": 17}, "n: must be at most 16"),
        ("ChatRequest", {}, "messages: the field is missing"),
        # what would change the answer
        ("ChatRequest", CHAT | {"tools": [1]}, "tools.0: must be an object"),
        (
            "ChatRequest",
            CHAT | {"guided_regex": "a"},
            "guided_regex: not supported here; leave it out",
        ),
        (
            "ChatRequest",
            CHAT | {"tool_choice": {}},
            "tool_choice.type: the field is missing",
        ),
        ("ChatRequest", CHAT | {"min_p": 0.5}, "min_p: not supported here; only 0 is"),
        (
            "ChatRequest",
            {"messages": [{"role": "user"}]},
            "messages.0.content: the field is missing",
        ),
        (
            "EmbeddingRequest",
            {"input": [{"text": "a", "video": "b"}]},
            "input.0.video: not supported here; leave it out",
        ),
        (
            "EmbeddingRequest",
            {"input": "a", "embed_dtype": "float16"},
            'embed_dtype: not supported here; only "float32" is',
        ),
        ("RerankRequest", {"query": "a"}, "documents: the field is missing"),
        ("ScoreRequest", {"queries": "a"}, "documents: the field is missing"),
        (
            "ChatRequest",
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "messages.0.content.0: 'type' must be 'text' or 'image_url', not 'audio'",
        ),
        (
            "ChatRequest",
            {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
            "messages.0.content.0: 'type' is missing",
        ),
    ],
)
def test_the_message_of_a_wrong_body(name: str, body: Any, message: str):
    error = refusal(name, body)
    assert str(error) == message
    assert error.status == 400
    assert error.param == (message.partition(":")[0] if ":" in message else None)


def test_long_tags_are_cut():
    part = {"type": "x" * 10_000}
    assert len(str(refusal("ChatRequest", {"messages": [{"role": "user", "content": [part]}]}))) < (
        200
    )
