"""Embeddings in other makers' shapes: Cohere's `/v2/embed`, TEI's `/embed` and `/embed_all`."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cafe.serving.content import Reader
from cafe.serving.errors import ApiError, json_response
from cafe.serving.inputs import read_items
from cafe.serving.schema_vectors import CohereEmbedRequest, TeiEmbedRequest
from cafe.serving.service import Embedded, Service
from cafe.serving.vectors import as_numbers, checked_width, encoded, unit_vectors
from cafe.types import Conversation


def embed_routes(service: Service) -> APIRouter:
    """The routes of Cohere and of Text Embeddings Inference."""
    router = APIRouter()

    @router.post("/v2/embed", operation_id="cohere_embed")
    async def cohere(body: CohereEmbedRequest, request: Request) -> Response:
        """Embed texts, images, or both together; several types of numbers in one answer."""
        service.accept(request, body)
        dimension = service.engine.model.dimension
        width = checked_width(body.output_dimension, dimension, "output_dimension")
        conversations = await _cohere_inputs(service, service.reader(request), body)
        embedded = await service.embed(request, conversations, truncate=body.truncate == "END")
        return await service.run_in_thread(_cohere_response, body, embedded, width)

    @router.post("/embed", operation_id="tei_embed")
    async def tei(body: TeiEmbedRequest, request: Request) -> Response:
        """Embed texts; the answer is an array of vectors."""
        service.accept(request, body)
        width = checked_width(body.dimensions, service.engine.model.dimension)
        texts = await read_items(service, service.reader(request), body.inputs, "inputs")
        embedded = await service.embed(request, texts, truncate=body.truncate)
        cut = embedded.vectors[:, :width]
        vectors = unit_vectors(cut, width) if body.normalize else cut
        return json_response(await service.run_in_thread(vectors.tolist))

    @router.post("/embed_all", operation_id="tei_embed_all")
    async def tei_all(body: TeiEmbedRequest, request: Request) -> Response:
        """A vector for each token; the answer is an array of arrays of vectors."""
        service.accept(request, body)
        for name, wrong in {
            "dimensions": body.dimensions is not None,
            "truncate": body.truncate,
            "normalize": not body.normalize,
        }.items():
            if wrong:
                raise ApiError.invalid(f"{name}: not supported here; leave it out", name)
        texts = await read_items(service, service.reader(request), body.inputs, "inputs")
        tokens = await service.token_vectors(request, texts)
        return json_response([one.vectors.tolist() for one in tokens])

    return router


async def _cohere_inputs(
    service: Service, reader: Reader, body: CohereEmbedRequest
) -> list[Conversation]:
    given = [name for name in ("texts", "images", "inputs") if getattr(body, name) is not None]
    if len(given) != 1:
        raise ApiError.invalid("give one of texts, images and inputs", "texts")
    if body.inputs is None:
        only_images = body.images is not None
        values = body.images if only_images else body.texts
        return await read_items(service, reader, values, given[0], images=only_images)
    service.check_count(len(body.inputs), "inputs")
    read = [reader.parts(one.content, f"inputs.{i}.content") for i, one in enumerate(body.inputs)]
    return list(await asyncio.gather(*read))


def _cohere_response(body: CohereEmbedRequest, embedded: Embedded, width: int) -> Response:
    vectors = unit_vectors(embedded.vectors, width)
    by_type: dict[str, list[Any]] = {}
    for kind in body.embedding_types or ["float"]:
        sent = as_numbers(vectors, "float" if kind == "base64" else kind)
        by_type[kind] = [encoded(vector, kind == "base64") for vector in sent]
    units = {"input_tokens": embedded.tokens, "images": len(body.images or [])}
    return json_response(
        {
            "id": f"embd-{uuid.uuid4().hex}",
            "response_type": "embeddings_by_type",
            "embeddings": by_type,
            "texts": body.texts or [],
            "meta": {"api_version": {"version": "2"}, "billed_units": units},
        }
    )
