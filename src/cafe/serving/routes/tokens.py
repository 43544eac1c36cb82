"""`/tokenize` and `/detokenize`, in vLLM's shape: texts and chats as tokens, and tokens as text."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from cafe.serving.answering import ToolChoices
from cafe.serving.errors import ApiError, json_response
from cafe.serving.inputs import text_of_tokens
from cafe.serving.schema_responses import DetokenizeRequest, TokenizeRequest
from cafe.serving.service import Service
from cafe.serving.streams import as_api_errors
from cafe.types import Image


def token_routes(service: Service) -> APIRouter:
    """The routes between texts and tokens."""
    router = APIRouter()

    @router.post("/tokenize", operation_id="tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """The tokens of a text, or of a chat without images as the model is given it.

        This tokenizer puts nothing before a text, so `add_special_tokens` changes nothing.
        """
        service.accept(request, body)
        model = service.engine.model
        if (body.prompt is None) == (body.messages is None):
            raise ApiError.invalid("give either prompt or messages", "prompt")
        reader = service.reader(request)
        if body.messages is None:
            text = reader.text(body.prompt or "", "prompt")[0].text
        else:
            tools = ToolChoices(service, body.tools, None)
            chat = tools.told(await reader.messages(body.messages))
            if any(isinstance(part, Image) for message in chat for part in message.content):
                raise ApiError.invalid(
                    "messages: an image's tokens depend on its size and are not counted here; "
                    "usage.prompt_tokens of an answer counts them",
                    "messages",
                )
            with as_api_errors():
                text = await service.run_in_thread(model.prompt_text, chat)
        tokens: list[int] = await service.run_in_thread(model.tokens_of, text)
        reply = {"count": len(tokens), "max_model_len": model.max_tokens, "tokens": tokens}
        if body.return_token_strs:
            reply["token_strs"] = await service.run_in_thread(
                lambda: [model.token_text(token) for token in tokens]
            )
        return json_response(reply)

    @router.post("/detokenize", operation_id="detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """The text of tokens, without special ones."""
        service.accept(request, body)
        _ = service.engine.model  # refuses while the model loads
        text = await text_of_tokens(service, body.tokens, "tokens") if body.tokens else ""
        return json_response({"prompt": text})

    return router
