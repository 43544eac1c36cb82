"""Gradio inside the server's application, and the form that asks for the key."""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import MutableMapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from cafe.errors import CafeError
from cafe.serve.door import LOGIN, PAGE, Door
from cafe.serve.gate import App, Receive, Scope, Send
from cafe.serve.page.pictures import Pictures
from cafe.serve.refusal import Refused
from cafe.serve.service import Service

HERE = Path(__file__).parent
JOIN = f"{PAGE}/gradio_api/queue/join"
UPLOAD = f"{PAGE}/gradio_api/upload"
FILE = f"{PAGE}/gradio_api/file="

HELD_BYTES = 2**30
"""What uploads and copies may take on disk together; the oldest go first."""

SWEEP_SECONDS = 10.0
WRONG_KEY_SECONDS = 1.0

# The page is whole without the network, and no other site may frame it. Gradio's scripts and styles
# are partly inline, and it evaluates a function of ours.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
ICON = (
    "<link rel=icon href=\"data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' "
    "viewBox='0 0 9 9'><circle cx='4.5' cy='4.5' r='4' fill='%23b45309'/></svg>\">"
)
"""Of the tab, without a file."""

_FILE_POLICY = "default-src 'none'; sandbox"
"""An uploaded file is a picture or nothing, whatever else it may contain."""


def attach(app: FastAPI, service: Service, door: Door, root: Path | None) -> App:
    """`app` with the page at `PAGE`.

    root   of the index's pictures
    Raises CafeError when gradio is not installed.
    """
    kept = folder()
    try:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(kept)
        import gradio as gr
        from gradio.themes import Base
        from gradio.themes.utils.fonts import Font

        from cafe.serve.page.layout import layout
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("cafe"):
            raise
        raise CafeError(f"the page needs {error.name}: pip install 'cafe-vlm[ui]'") from error

    app.router.routes += [
        Route("/", _to_page, include_in_schema=False),
        Route(LOGIN, functools.partial(_login, door), methods=["GET", "POST"]),
    ]
    blocks = layout(service, Pictures(root, kept))
    gr.mount_gradio_app(
        app,
        blocks,
        PAGE,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=service.limits.body_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=Base(
            primary_hue="amber",
            neutral_hue="stone",
            font=[Font("system-ui"), Font("sans-serif")],
            font_mono=[Font("ui-monospace"), Font("monospace")],
        ).set(
            # White on the hue's own amber cannot be read, nor amber on white.
            color_accent="*primary_700",
            button_primary_background_fill="*primary_700",
            button_primary_background_fill_dark="*primary_700",
            button_primary_background_fill_hover="*primary_800",
            button_primary_background_fill_hover_dark="*primary_800",
            button_primary_text_color="white",
        ),
        head=ICON,
        css=(HERE / "style.css").read_text(encoding="utf-8"),
    )
    return _Threshold(app, blocks, kept)


@functools.cache
def folder() -> Path:
    """Where uploads and copies lie until the process ends: gradio knows one folder per process."""
    kept = Path(tempfile.mkdtemp(prefix="cafe-page-")).resolve()
    atexit.register(shutil.rmtree, kept, ignore_errors=True)
    return kept


class _Threshold:
    """Before gradio: its queue is started, and what it is given and gives is looked at."""

    def __init__(self, app: FastAPI, blocks: Any, kept: Path) -> None:
        self._app, self._blocks, self._kept = app, blocks, kept
        self._started = False
        self._next_sweep = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if not path.startswith(f"{PAGE}/"):
            await self._app(scope, receive, send)  # pyright: ignore[reportArgumentType]
            return
        if not self._started:
            self._started = True
            self._blocks.run_startup_events()
        if path.startswith(FILE) and not self._holds(path.removeprefix(FILE)):
            raise Refused(404, "there is no such file")
        if path in (UPLOAD, JOIN) and time.monotonic() > self._next_sweep:
            self._next_sweep = time.monotonic() + SWEEP_SECONDS
            await asyncio.get_running_loop().run_in_executor(None, keep_below, self._kept)
        if path == JOIN:
            receive = await self._checked(receive)
        policy = _FILE_POLICY if path.startswith(FILE) else _POLICY
        await self._app(scope, receive, _with_headers(send, policy))  # pyright: ignore

    def _holds(self, name: str) -> bool:
        return Path(name).resolve().is_relative_to(self._kept)

    async def _checked(self, receive: Receive) -> Receive:
        """Gradio would fetch a picture from whatever address an event names."""
        message = await receive()  # the gate gives the body in one piece
        try:
            named = list(_files(json.loads(message.get("body", b""))))
        except (ValueError, RecursionError):
            raise Refused.invalid("the body is not JSON") from None
        if not all(isinstance(name, str) and self._holds(name) for name in named):
            raise Refused(403, "files are never read, and addresses never fetched")
        messages = iter([message])

        async def again() -> MutableMapping[str, Any]:
            for first in messages:
                return first
            return await receive()

        return again


def _files(value: Any) -> Any:
    """Every path that an event names."""
    if isinstance(value, dict):
        if value.get("path") is not None:
            yield value["path"]
        for inner in value.values():
            yield from _files(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _files(inner)


def _with_headers(send: Send, policy: str) -> Send:
    extra = [
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        # Not no-referrer: then a browser sends the form that asks for the key without its origin.
        (b"referrer-policy", b"same-origin"),
    ]

    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return sent


def keep_below(kept: Path, held_bytes: int = HELD_BYTES) -> None:
    """Delete the oldest files until the others take at most `held_bytes`."""
    files = []
    for file in kept.rglob("*"):
        try:
            if file.is_file():
                files.append((file.stat().st_mtime, file.stat().st_size, file))
        except FileNotFoundError:
            continue
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= held_bytes:
            return
        file.unlink(missing_ok=True)
        total -= size


# ---------------------------------------------------------------------- the form


async def _to_page(request: Request) -> Response:
    return RedirectResponse(f"{PAGE}/", 303)


async def _login(door: Door, request: Request) -> Response:
    if door.api_key is None:
        return await _to_page(request)
    if request.method == "GET":
        return _form()
    fields = parse_qs((await request.body()).decode("utf-8", "replace"))
    cookie = door.cookie(fields.get("key", [""])[0])
    if cookie is None:
        await asyncio.sleep(WRONG_KEY_SECONDS)
        return _form("That is not the key.")
    response = await _to_page(request)
    response.headers["Set-Cookie"] = cookie
    return response


def _form(error: str = "") -> Response:
    page = (HERE / "login.html").read_text(encoding="utf-8")
    told = f'<p role="alert">{escape(error)}</p>' if error else ""
    return HTMLResponse(
        page.replace("<!-- error -->", told).replace("<!-- icon -->", ICON), 401 if error else 200
    )
