"""The routes that answer with vectors or with orders: embeddings, rerank, search."""

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

from cafe.serve.refusal import Refused, json_response
from cafe.serve.schema import (
    ChatMessage,
    Content,
    EmbeddingRequest,
    RerankRequest,
    SearchRequest,
)
from cafe.serve.service import Search, Service, explained
from cafe.serve.work import Embedding, Item, Score
from cafe.types import Conversation, Hit


def embedding_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/embeddings", operation_id="embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Embed texts or conversations; each goes through the embedding template."""
        service.check_model(body.model)
        dimension = service.engine.model.dimension
        width = dimension if body.dimensions is None else body.dimensions
        if width > dimension:
            raise Refused.invalid(f"dimensions: the model has {dimension}", "dimensions")
        conversations = await _inputs(service, request, body)
        items = [Item(c, number) for number, c in enumerate(conversations)]
        found: list[Embedding] = await service.results(request, "embed", items)
        tokens = sum(embedding.tokens for embedding in found)
        service.meters.tokens(tokens)
        head = {
            "id": f"embd-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": service.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return await service.aside(_embedding_response, head, found, width, body.encoding_format)

    return router


def _embedding_response(
    head: dict[str, Any], found: list[Embedding], width: int, encoding: str
) -> Response:
    vectors = unit([embedding.vector for embedding in found], width)
    data = [
        {"object": "embedding", "index": index, "embedding": encoded(vector, encoding)}
        for index, vector in enumerate(vectors)
    ]
    return json_response(head | {"data": data})


def unit(vectors: list[np.ndarray], width: int) -> np.ndarray:
    """The first `width` coordinates at unit length, float32 [n, width], as `CAFe.encode` does."""
    cut = np.stack(vectors)[:, :width]
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)


def encoded(vector: np.ndarray, encoding: str) -> list[float] | str:
    """Numbers, or base64 of little-endian float32."""
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


async def _inputs(service: Service, request: Request, body: EmbeddingRequest) -> list[Conversation]:
    reader = service.reader(request)
    if (body.input is None) == (body.messages is None):
        raise Refused.invalid("give either input (texts) or messages (chats)", "input")
    if body.messages is not None:
        chats = _chats(body.messages)
        _check_count(service, len(chats), "messages")
        return list(await asyncio.gather(*[reader.messages(chat) for chat in chats]))
    texts = [body.input] if isinstance(body.input, str) else body.input or []
    _check_count(service, len(texts), "input")
    return [reader.text(str(text), f"input.{i}") for i, text in enumerate(texts)]


def _chats(messages: list[ChatMessage] | list[list[ChatMessage]]) -> list[list[ChatMessage]]:
    """A batch of conversations, also when there is one."""
    single = [m for m in messages if isinstance(m, ChatMessage)]
    return [single] if single else [m for m in messages if isinstance(m, list)]


def _check_count(service: Service, count: int, param: str) -> None:
    if count > service.limits.inputs:
        raise Refused.invalid(
            f"{param}: {count:,} exceed the limit of {service.limits.inputs:,}", param
        )


def rerank_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/rerank", operation_id="rerank")
    async def rerank(body: RerankRequest, request: Request) -> Response:
        """Order documents by how well each matches the query."""
        from cafe.model.inference import match_question  # late: the server listens before torch

        service.check_model(body.model)
        _check_count(service, len(body.documents), "documents")
        reader = service.reader(request)
        query = await reader.content(body.query, "query")
        documents = await asyncio.gather(
            *[reader.content(d, f"documents.{i}") for i, d in enumerate(body.documents)]
        )
        with explained():
            questions = [match_question(query, document) for document in documents]
        items = [Item(question, number) for number, question in enumerate(questions)]
        scores: list[Score] = await service.results(request, "score", items)
        tokens = sum(score.tokens for score in scores)
        service.meters.tokens(tokens)
        order = sorted(range(len(scores)), key=lambda i: scores[i].score, reverse=True)
        results = [
            {"index": i, "relevance_score": scores[i].score}
            | ({"document": _echo(body.documents[i])} if body.return_documents else {})
            for i in order[: body.top_n]
        ]
        return json_response(
            {
                "id": f"rerank-{uuid.uuid4().hex}",
                "model": service.name,
                "results": results,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    return router


def _echo(document: str | Content) -> dict[str, Any]:
    """A text document again; pictures are not sent back."""
    text = document if isinstance(document, str) else document.text
    return {} if text is None else {"text": text}


def search_routes(service: Service, search: Search) -> APIRouter:
    router = APIRouter()

    @router.post("/search", operation_id="search")
    async def find(body: SearchRequest, request: Request) -> Response:
        """Search the index by words, by a picture, or by both."""
        if body.query is None and body.image is None:
            raise Refused.invalid("give query, image or both", "query")
        content = Content(text=body.query, image=body.image)
        hits = await hits_of(service, search, request, content, body.top, body.where)
        return json_response(
            {"hits": [{"id": h.id, "score": h.score, "metadata": h.metadata} for h in hits]}
        )

    return router


async def hits_of(
    service: Service,
    search: Search,
    request: Request,
    query: Content,
    top: int,
    where: str | None = None,
) -> list[Hit]:
    """The `top` nearest rows to a query of text, a picture or both. Raises Refused."""
    conversation = await service.reader(request).content(query, "query")
    found: list[Embedding] = await service.results(request, "embed", [Item(conversation)])
    service.meters.tokens(found[0].tokens)
    (vector,) = unit([found[0].vector], len(found[0].vector))
    return list(await service.aside(search, vector, top, where))
