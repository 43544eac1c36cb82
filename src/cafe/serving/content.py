"""Converts the texts and images of a request to conversations, within the limits.

A request cannot refer to a file: an image is a data URI or, if the server was started to allow
that, a URL on the public internet.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
import re
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import PIL.Image

from cafe.errors import ImageError
from cafe.image_cost import excess
from cafe.media import open_image
from cafe.serving.errors import ApiError
from cafe.serving.limits import Limits, Reservation
from cafe.serving.schema import ChatMessage, Content, ContentPart, ImagePart, ImageURL, TextPart
from cafe.types import Conversation, Image, Message, Role, ToolCall
from cafe.types import Part as ReadPart

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats that are decoded. Pillow supports more, and some of these (EPS) execute code."""

LOW_DETAIL_PIXELS = 512 * 512
"""What "detail": "low" leaves of an image; OpenAI's has as many."""

DATA_URI = re.compile(
    r"data:(image/[\w.+-]{1,99}|application/octet-stream)(;[\w.+-]{1,99}=[^;,\s]{1,99}){0,9};base64,",
    re.ASCII | re.IGNORECASE,
)


class Reader:
    """Reads the content of one request, and counts its texts, images and pixels."""

    def __init__(
        self,
        limits: Limits,
        pixels: Reservation,
        fetch: Callable[[str], Awaitable[bytes]] | None,
        pool: ThreadPoolExecutor,
        owner: bytes,
    ) -> None:
        """Create the reader of one request.

        Args:
            limits: Of the request.
            pixels: Where the request reserves the pixels of its images.
            fetch: Downloads a remote image; None: remote images are refused.
            pool: Threads that decode images.
            owner: Who sent the request, at most 64 bytes; equal images of different owners get
                different digests, so that nothing is kept for both.
        """
        self._limits, self._pixels, self._fetch, self._pool = limits, pixels, fetch, pool
        self._owner = owner
        self._images = self._characters = 0

    async def messages(self, messages: Sequence[ChatMessage]) -> Conversation:
        """Read a chat. Raises ApiError (400, 429), naming the field."""
        return tuple([await self._message(m, f"messages.{i}") for i, m in enumerate(messages)])

    async def _message(self, message: ChatMessage, param: str) -> Message:
        parts = await self._parts(message.content or "", f"{param}.content")
        calls = [call.function for call in message.tool_calls or []]
        for call in calls:
            self._text(call.name + call.arguments, f"{param}.tool_calls")
        return Message(
            _role(message.role), parts, calls=tuple(ToolCall(c.name, c.arguments) for c in calls)
        )

    def text(self, text: str, param: str) -> Conversation:
        """One text as a user turn."""
        return (Message("user", (self._text(text, param),)),)

    async def content(self, content: str | Content, param: str) -> Conversation:
        """Read a query or a document as a user turn. Raises ApiError as `messages` does."""
        if isinstance(content, str):
            return self.text(content, param)
        names = ("content", "text", "image", "image_url")
        fields = [name for name in names if getattr(content, name) is not None]
        if not fields or ("content" in fields and len(fields) > 1):
            raise ApiError.invalid(f"{param}: give content, or text, image or both", param)
        if content.content is not None:
            return await self.parts(content.content, param)
        parts: list[ReadPart] = []
        if content.image is not None:
            parts.append(await self._image(content.image, f"{param}.image"))
        if content.image_url is not None:
            parts.append(await self._image_url(content.image_url, f"{param}.image_url"))
        if content.text is not None:
            parts.append(self._text(content.text, f"{param}.text"))
        return (Message("user", tuple(parts)),)

    async def parts(self, content: str | Sequence[ContentPart], param: str) -> Conversation:
        """Read the content of one user turn."""
        return (Message("user", await self._parts(content, param)),)

    async def image(self, url: str, param: str) -> Conversation:
        """Read one image as a user turn."""
        return (Message("user", (await self._image(url, param),)),)

    async def _parts(
        self, content: str | Sequence[ContentPart], param: str
    ) -> tuple[ReadPart, ...]:
        if isinstance(content, str):
            return (self._text(content, param),)
        return tuple([await self._part(p, f"{param}.{i}") for i, p in enumerate(content)])

    async def _part(self, part: TextPart | ImagePart, param: str) -> ReadPart:
        if isinstance(part, TextPart):
            return self._text(part.text, f"{param}.text")
        return await self._image_url(part.image_url, f"{param}.image_url")

    async def _image_url(self, image: ImageURL | str, param: str) -> Image:
        if isinstance(image, str):
            return await self._image(image, param)
        return await self._image(image.url, param, low=image.detail == "low")

    def _text(self, text: str, param: str) -> str:
        if len(text) > self._limits.text_characters:
            raise ApiError.invalid(
                f"{param}: {len(text):,} characters exceed the limit of "
                f"{self._limits.text_characters:,}",
                param,
                "context_length_exceeded",
            )
        self._characters += len(text)
        if self._characters > self._limits.request_characters:
            raise ApiError.invalid(
                f"the request's texts exceed {self._limits.request_characters:,} characters", param
            )
        return text

    async def _image(self, url: str, param: str, *, low: bool = False) -> Image:
        self._images += 1
        if self._images > self._limits.images:
            raise ApiError.invalid(f"more than {self._limits.images} images in a request", param)
        remote = url[:8].lower().startswith(("http://", "https://"))
        content = await self._remote(url, param) if remote else url
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._open, content, param, low)

    async def _remote(self, url: str, param: str) -> bytes:
        if self._fetch is None:
            raise ApiError.invalid(
                f"{param}: remote images are not allowed here; send a data URI "
                "(data:image/png;base64,…)",
                param,
            )
        return await self._fetch(url)

    def _open(self, source: str | bytes, param: str, low: bool) -> Image:
        content = _data(source, param) if isinstance(source, str) else source
        reason = excess(content)
        if reason is not None:
            raise ApiError.invalid(f"{param}: the image {reason}", param, "invalid_image")
        try:
            image = PIL.Image.open(io.BytesIO(content), formats=FORMATS)
        except PIL.Image.DecompressionBombError as error:
            raise _too_large(param, str(error)) from error
        except Exception as error:  # decoders raise arbitrary exceptions on broken files
            supported = ", ".join(FORMATS)
            raise ApiError.invalid(
                f"{param}: not a readable image (supported: {supported})", param, "invalid_image"
            ) from error
        pixels = image.width * image.height
        if pixels > self._limits.image_pixels:
            raise _too_large(
                param,
                f"{image.width}x{image.height} pixels exceed the limit of "
                f"{self._limits.image_pixels:,}",
            )
        if self._pixels.taken + pixels > self._limits.request_pixels:
            raise ApiError.invalid(
                f"the request's images exceed {self._limits.request_pixels:,} pixels", param
            )
        self._pixels.take(pixels)
        try:
            found = Image(image, LOW_DETAIL_PIXELS if low else None)
            opened = open_image(found, max_pixels=self._limits.image_pixels)
            return Image(opened, digest=self._digest(content, low))
        except ImageError as error:
            raise ApiError.invalid(f"{param}: {error}", param, "invalid_image") from error

    def _digest(self, content: bytes, low: bool) -> str:
        """Names what the model sees of an image file that this owner sent."""
        state = hashlib.blake2b(b"low" if low else b"", key=self._owner, digest_size=32)
        state.update(b"\0" + content)
        return state.hexdigest()


def _too_large(param: str, reason: str) -> ApiError:
    return ApiError.invalid(f"{param}: {reason}; resize it", param, "image_too_large")


def _data(url: str, param: str) -> bytes:
    """Decode a data URI."""
    head = DATA_URI.match(url)
    if head is None:
        raise ApiError.invalid(
            f"{param}: give a data URI (data:image/png;base64,…); local files are never read", param
        )
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError.invalid(f"{param}: invalid base64", param) from error


def _role(role: str) -> Role:
    """OpenAI's newer models call the system role "developer"."""
    match role:
        case "system" | "user" | "assistant" | "tool":
            return role
        case _:
            return "system"
