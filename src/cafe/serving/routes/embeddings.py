"""`/v1/embeddings`, and `/embeddings` of infinity: inputs as unit vectors; `/pooling` of vLLM."""

from __future__ import annotations

import time
import uuid
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cafe.serving.errors import json_response
from cafe.serving.inputs import read_inputs
from cafe.serving.schema_vectors import EmbeddingRequest, NumberType, PoolingRequest
from cafe.serving.service import Embedded, Service
from cafe.serving.vectors import as_numbers, checked_width, encoded, unit_vectors


def embedding_routes(service: Service) -> APIRouter:
    """The routes for embeddings in OpenAI's shape, and for vLLM's pooling."""
    router = APIRouter()

    @router.post("/embeddings", operation_id="infinity_embeddings")
    @router.post("/v1/embeddings", operation_id="embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Embed texts, images or conversations, each formatted with the embedding template."""
        service.accept(request, body)
        width = checked_width(body.dimensions, service.engine.model.dimension)
        conversations = await read_inputs(
            service,
            request,
            body,
            images=body.modality == "image",
            instruction=body.instruction,
        )
        caption, think = body.caption is True, body.think or 0
        embedded = await service.embed(
            request,
            conversations,
            caption=caption,
            think=think,
            truncate=body.truncate_prompt_tokens is not None,
        )
        written = "thought" if think else "caption" if caption else None
        return await service.run_in_thread(
            _embedding_response,
            _head(service, "embd", embedded.tokens),
            embedded,
            written,
            width,
            body.numbers,
        )

    @router.post("/pooling", operation_id="pooling")
    async def pooling(body: PoolingRequest, request: Request) -> Response:
        """A vector for each token of an input where the model has them, else one for the input."""
        service.accept(request, body)
        width = service.engine.model.token_width
        conversations = await read_inputs(service, request, body)
        if body.task == "token_embed" or (body.task is None and width is not None):
            tokens = await service.token_vectors(request, conversations)
            vectors = [one.vectors for one in tokens]
            count = sum(one.tokens for one in tokens)
        else:
            embedded = await service.embed(request, conversations)
            vectors = list(unit_vectors(embedded.vectors, embedded.vectors.shape[1]))
            count = embedded.tokens
        return await service.run_in_thread(
            _pooling_response,
            _head(service, "pool", count),
            vectors,
            body.encoding_format == "base64",
        )

    return router


def _head(service: Service, prefix: str, tokens: int) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": service.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _embedding_response(
    head: dict[str, Any],
    embedded: Embedded,
    written: str | None,
    width: int,
    numbers: tuple[NumberType, bool],
) -> Response:
    """`written` is what the reply calls the words that the model wrote of an input."""
    kind, as_base64 = numbers
    sent = as_numbers(unit_vectors(embedded.vectors, width), kind)
    data: list[dict[str, Any]] = [
        {"object": "embedding", "index": index, "embedding": encoded(vector, as_base64)}
        for index, vector in enumerate(sent)
    ]
    if written is not None:
        for one, text in zip(data, embedded.captions, strict=True):
            one[written] = text
    return json_response(head | {"data": data})


def _pooling_response(head: dict[str, Any], vectors: list[np.ndarray], as_base64: bool) -> Response:
    """`vectors` are [tokens, d] or [d] for each input."""
    data = [
        {"object": "pooling", "index": index, "data": encoded(one.astype("<f4"), as_base64)}
        for index, one in enumerate(vectors)
    ]
    return json_response(head | {"data": data})
