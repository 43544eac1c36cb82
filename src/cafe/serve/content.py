"""Texts and pictures of a request -> conversations, within the limits.

No request names a file: a picture is a data URI, or an address on the public internet where the
server was told to allow these.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import PIL.Image

from cafe.errors import ImageError
from cafe.media import open_image
from cafe.serve.limits import Limits, Share
from cafe.serve.refusal import Refused
from cafe.serve.schema import ChatMessage, Content, ImagePart, Part, TextPart
from cafe.types import Conversation, Image, Message, Role
from cafe.types import Part as ReadPart

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is decoded. Pillow knows more, and some of it (EPS) is run as a program."""

DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII | re.IGNORECASE)


class Reader:
    """Reads the content of one request; counts what it holds.

    fetch   gets a remote picture's bytes; None: these are refused
    pool    where pictures are decoded
    """

    def __init__(
        self,
        limits: Limits,
        pixels: Share,
        fetch: Callable[[str], Awaitable[bytes]] | None,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._limits, self._pixels, self._fetch, self._pool = limits, pixels, fetch, pool
        self._images = self._characters = 0

    async def messages(self, messages: Sequence[ChatMessage]) -> Conversation:
        """A chat. Raises Refused (400, 429), naming the field."""
        return tuple(
            [
                Message(_role(m.role), await self._parts(m.content, f"messages.{i}.content"))
                for i, m in enumerate(messages)
            ]
        )

    def text(self, text: str, param: str) -> Conversation:
        """One text as a user's turn."""
        return (Message("user", (self._text(text, param),)),)

    async def content(self, content: str | Content, param: str) -> Conversation:
        """A side of a rerank or of a search. Raises Refused as `messages` does."""
        if isinstance(content, str):
            return self.text(content, param)
        given = [
            name for name in ("content", "text", "image") if getattr(content, name) is not None
        ]
        if not given or ("content" in given and len(given) > 1):
            raise Refused.invalid(f"{param}: give content, or text, image or both", param)
        if content.content is not None:
            return (Message("user", await self._parts(content.content, param)),)
        parts: list[ReadPart] = []
        if content.image is not None:
            parts.append(await self._image(content.image, f"{param}.image"))
        if content.text is not None:
            parts.append(self._text(content.text, f"{param}.text"))
        return (Message("user", tuple(parts)),)

    async def _parts(self, content: str | Sequence[Part], param: str) -> tuple[ReadPart, ...]:
        if isinstance(content, str):
            return (self._text(content, param),)
        return tuple([await self._part(p, f"{param}.{i}") for i, p in enumerate(content)])

    async def _part(self, part: TextPart | ImagePart, param: str) -> ReadPart:
        if isinstance(part, TextPart):
            return self._text(part.text, f"{param}.text")
        url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
        return await self._image(url, f"{param}.image_url")

    def _text(self, text: str, param: str) -> str:
        if len(text) > self._limits.text_characters:
            raise Refused.invalid(
                f"{param}: {len(text):,} characters exceed the limit of "
                f"{self._limits.text_characters:,}",
                param,
                "context_length_exceeded",
            )
        self._characters += len(text)
        if self._characters > self._limits.request_characters:
            raise Refused.invalid(
                f"the request's texts exceed {self._limits.request_characters:,} characters", param
            )
        return text

    async def _image(self, url: str, param: str) -> Image:
        self._images += 1
        if self._images > self._limits.images:
            raise Refused.invalid(f"more than {self._limits.images} pictures in a request", param)
        remote = url[:8].lower().startswith(("http://", "https://"))
        content = await self._remote(url, param) if remote else url
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._opened, content, param)

    async def _remote(self, url: str, param: str) -> bytes:
        if self._fetch is None:
            raise Refused.invalid(
                f"{param}: remote pictures are not allowed here; send a data URI "
                "(data:image/png;base64,…)",
                param,
            )
        return await self._fetch(url)

    def _opened(self, source: str | bytes, param: str) -> Image:
        content = _data(source, param) if isinstance(source, str) else source
        try:
            picture = PIL.Image.open(io.BytesIO(content), formats=FORMATS)
        except PIL.Image.DecompressionBombError as error:
            raise _too_large(param, str(error)) from error
        except Exception as error:  # decoders of broken files raise whatever they like
            known = ", ".join(FORMATS)
            raise Refused.invalid(
                f"{param}: not a picture that can be read (known: {known})", param, "invalid_image"
            ) from error
        pixels = picture.width * picture.height
        if pixels > self._limits.image_pixels:
            raise _too_large(
                param,
                f"{picture.width}x{picture.height} pixels exceed the limit of "
                f"{self._limits.image_pixels:,}",
            )
        if self._pixels.taken + pixels > self._limits.request_pixels:
            raise Refused.invalid(
                f"the request's pictures exceed {self._limits.request_pixels:,} pixels", param
            )
        self._pixels.take(pixels)
        try:
            return Image(open_image(Image(picture), max_pixels=self._limits.image_pixels))
        except ImageError as error:
            raise Refused.invalid(f"{param}: {error}", param, "invalid_image") from error


def _too_large(param: str, reason: str) -> Refused:
    return Refused.invalid(f"{param}: {reason}; make it smaller", param, "image_too_large")


def _data(url: str, param: str) -> bytes:
    """The content of a data URI."""
    head = DATA_URI.match(url)
    if head is None:
        raise Refused.invalid(
            f"{param}: give a data URI (data:image/png;base64,…); files are never read", param
        )
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused.invalid(f"{param}: its base64 is broken", param) from error


def _role(role: str) -> Role:
    """OpenAI's newer models call the system a developer."""
    match role:
        case "system" | "user" | "assistant":
            return role
        case _:
            return "system"
