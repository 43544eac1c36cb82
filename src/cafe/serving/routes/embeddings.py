"""`/v1/embeddings`: texts or conversations as unit vectors."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cafe.serving.errors import ApiError, json_response
from cafe.serving.schema import ChatMessage, EmbeddingRequest
from cafe.serving.service import Embedded, Service
from cafe.types import Conversation


def embedding_routes(service: Service) -> APIRouter:
    """The route for embeddings."""
    router = APIRouter()

    @router.post("/v1/embeddings", operation_id="embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Embed texts or conversations, each formatted with the embedding template."""
        service.check_model(body.model)
        dimension = service.engine.model.dimension
        width = dimension if body.dimensions is None else body.dimensions
        if width > dimension:
            raise ApiError.invalid(
                f"dimensions: the model's embeddings have only {dimension}", "dimensions"
            )
        conversations = await _inputs(service, request, body)
        caption, think = body.caption is True, body.think or 0
        embedded = await service.embed(request, conversations, caption=caption, think=think)
        written = "thought" if think else "caption" if caption else None
        head = {
            "id": f"embd-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": service.name,
            "usage": {"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens},
        }
        return await service.run_in_thread(
            _embedding_response, head, embedded, written, width, body.encoding_format
        )

    return router


def _embedding_response(
    head: dict[str, Any], embedded: Embedded, written: str | None, width: int, encoding: str
) -> Response:
    """`written` is what the reply calls the words that the model wrote of an input."""
    data: list[dict[str, Any]] = [
        {"object": "embedding", "index": index, "embedding": encode_vector(vector, encoding)}
        for index, vector in enumerate(unit_vectors(embedded.vectors, width))
    ]
    if written is not None:
        for one, text in zip(data, embedded.captions, strict=True):
            one[written] = text
    return json_response(head | {"data": data})


def unit_vectors(vectors: np.ndarray, width: int) -> np.ndarray:
    """The first `width` coordinates of each vector, normalised as in `CAFe.encode`.

    Args:
        vectors: [n, d].
        width: At most d.

    Returns:
        float32 [n, width], each row of length 1.
    """
    truncated = vectors[:, :width]
    return truncated / np.maximum(np.linalg.norm(truncated, axis=1, keepdims=True), 1e-12)


def encode_vector(vector: np.ndarray, encoding: str) -> list[float] | str:
    """A list of numbers ("float"), or base64 of little-endian float32 ("base64")."""
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


async def _inputs(service: Service, request: Request, body: EmbeddingRequest) -> list[Conversation]:
    reader = service.reader(request)
    if (body.input is None) == (body.messages is None):
        raise ApiError.invalid("give either input (texts) or messages (conversations)", "input")
    if body.messages is not None:
        chats = _chats(body.messages)
        service.check_count(len(chats), "messages")
        return list(await asyncio.gather(*[reader.messages(chat) for chat in chats]))
    texts = [body.input] if isinstance(body.input, str) else body.input or []
    service.check_count(len(texts), "input")
    return [reader.text(str(text), f"input.{i}") for i, text in enumerate(texts)]


def _chats(messages: list[ChatMessage] | list[list[ChatMessage]]) -> list[list[ChatMessage]]:
    """One conversation or a batch of them, as a batch."""
    single = [m for m in messages if isinstance(m, ChatMessage)]
    return [single] if single else [m for m in messages if isinstance(m, list)]
