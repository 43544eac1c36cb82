"""Reads what is to be embedded or compared: texts, lists of tokens, images, conversations."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from starlette.requests import Request

from cafe.serving.content import Reader
from cafe.serving.errors import ApiError
from cafe.serving.schema import ChatMessage, Content
from cafe.serving.service import Service
from cafe.types import Conversation, Message

log = logging.getLogger(__name__)


class InputBody(Protocol):
    """A body with `input` or `messages`."""

    input: Any
    messages: Any


async def read_inputs(
    service: Service,
    request: Request,
    body: InputBody,
    *,
    images: bool = False,
    instruction: str | None = None,
) -> list[Conversation]:
    """The conversations of a body, at most as many as the limit.

    Args:
        service: The model and its limits.
        request: Whose images are read.
        body: What was sent.
        images: Strings are images, as data URIs.
        instruction: A system turn before each; None: there is none.

    Raises:
        ApiError: 400 naming the field, 429.
    """
    reader = service.reader(request)
    if (body.input is None) == (body.messages is None):
        raise ApiError.invalid("give either input (texts) or messages (conversations)", "input")
    if body.messages is not None:
        chats = _chats(body.messages)
        service.check_count(len(chats), "messages")
        found = list(await asyncio.gather(*[reader.messages(chat) for chat in chats]))
    else:
        found = await read_items(service, reader, body.input, "input", images=images)
    return [instructed(one, instruction) for one in found]


async def read_items(
    service: Service, reader: Reader, value: Any, param: str, *, images: bool = False
) -> list[Conversation]:
    """One item or several: texts, contents, or lists of tokens. Raises as `read_inputs`."""
    single = not isinstance(value, list) or isinstance(value[0], int)
    items = [value] if single else value
    names = [param] if single else [f"{param}.{i}" for i in range(len(items))]
    service.check_count(len(items), param)

    async def read(item: str | Content | list[int], name: str) -> Conversation:
        if isinstance(item, list):
            return reader.text(await text_of_tokens(service, item, name), name)
        if isinstance(item, str) and images:
            return await reader.image(item, name)
        return await reader.content(item, name)

    return list(await asyncio.gather(*map(read, items, names)))


def instructed(conversation: Conversation, instruction: str | None) -> Conversation:
    """The conversation after a system turn with the instruction, if there is one."""
    if not instruction:
        return conversation
    return (Message("system", (instruction,)), *conversation)


async def text_of_tokens(service: Service, tokens: Sequence[int], param: str) -> str:
    """What the model's own tokenizer decodes the tokens to: the template is applied to text."""
    model = service.engine.model
    if len(tokens) > service.limits.text_characters:
        raise ApiError.invalid(
            f"{param}: {len(tokens):,} tokens exceed the limit of "
            f"{service.limits.text_characters:,}",
            param,
            "context_length_exceeded",
        )
    if max(tokens) >= model.vocabulary:
        raise ApiError.invalid(
            f"{param}: token {max(tokens):,} is not in the model's vocabulary of "
            f"{model.vocabulary:,}: use the model's own tokenizer, or send texts (LangChain: "
            "check_embedding_ctx_length=False)",
            param,
        )
    service.say_tokens()
    return await service.run_in_thread(model.text_of, tokens)


def _chats(messages: list[ChatMessage] | list[list[ChatMessage]]) -> list[list[ChatMessage]]:
    """One conversation or a batch of them, as a batch."""
    single = [m for m in messages if isinstance(m, ChatMessage)]
    return [single] if single else [m for m in messages if isinstance(m, list)]
