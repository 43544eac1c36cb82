"""Gradio inside the server's application, and the login form."""

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
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from cafe.documents import pdf_of
from cafe.errors import CafeError, DataError
from cafe.files import inside
from cafe.serving.errors import ApiError
from cafe.serving.middleware import App, Receive, Scope, Send
from cafe.serving.page.thumbnails import Thumbnails
from cafe.serving.page_auth import LOGIN, PAGE, UPLOAD, PageAuth
from cafe.serving.service import SearchFunction, Service

HERE = Path(__file__).parent
JOIN = f"{PAGE}/gradio_api/queue/join"
FILE = f"{PAGE}/gradio_api/file="
DOCUMENT = f"{PAGE}/document/"

HELD_BYTES = 2**30
"""Disk space for uploads and thumbnails together; the oldest are deleted first."""

SWEEP_SECONDS = 10.0
WRONG_KEY_SECONDS = 1.0

# The page works without the network, and no other site may frame it. Some of gradio's scripts and
# styles are inline, and it evaluates our JavaScript functions.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
ICON = (
    "<link rel=icon href=\"data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' "
    "viewBox='0 0 9 9'><circle cx='4.5' cy='4.5' r='4' fill='%23b45309'/></svg>\">"
)
"""The icon of the browser tab, without a file."""

_FILE_POLICY = "default-src 'none'; sandbox"
"""An uploaded file can only be shown as an image, whatever it contains."""


def mount_page(app: FastAPI, service: Service, page_auth: PageAuth, root: Path | None) -> App:
    """Mount the page at `PAGE`.

    Args:
        app: The application with the other routes.
        service: What the page searches and asks.
        page_auth: Checks the key that is typed into the login form.
        root: Folder of the index's images.

    Returns:
        `app` with the page, behind a `PageGuard`.

    Raises:
        CafeError: Gradio is not installed.
    """
    files = files_folder()
    try:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(files)
        import gradio as gr
        from gradio.themes import Base
        from gradio.themes.utils.fonts import Font

        from cafe.serving.page.layout import layout
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("cafe"):
            raise
        raise CafeError(f"the page needs {error.name}: pip install 'cafe-vlm[ui]'") from error

    app.router.routes += [
        Route("/", _to_page, include_in_schema=False),
        Route(LOGIN, functools.partial(_login, page_auth), methods=["GET", "POST"]),
    ]
    if root is not None and service.search is not None:
        send = functools.partial(_document, root, service.search)
        app.router.routes.append(Route(f"{DOCUMENT}{{path:path}}", send, include_in_schema=False))
    blocks = layout(service, Thumbnails(root, files))
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
            # White on the theme's own amber is unreadable, and so is amber on white.
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
    return PageGuard(app, blocks, files)


@functools.cache
def files_folder() -> Path:
    """Folder of uploads and thumbnails until the process ends: gradio has one per process."""
    files = Path(tempfile.mkdtemp(prefix="cafe-page-")).resolve()
    atexit.register(shutil.rmtree, files, ignore_errors=True)
    return files


class PageGuard:
    """Middleware around gradio: starts its queue, and checks which files events and URLs name."""

    def __init__(self, app: FastAPI, blocks: Any, files: Path) -> None:
        self._app, self._blocks, self._files = app, blocks, files
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
        if path.startswith(FILE) and not self._contains(path.removeprefix(FILE)):
            raise ApiError(404, "file not found")
        if path in (UPLOAD, JOIN) and time.monotonic() > self._next_sweep:
            self._next_sweep = time.monotonic() + SWEEP_SECONDS
            await asyncio.get_running_loop().run_in_executor(None, delete_oldest, self._files)
        if path == JOIN:
            receive = await self._check_event(receive)
        policy = _FILE_POLICY if path.startswith(FILE) else _POLICY
        await self._app(scope, receive, _with_headers(send, policy))  # pyright: ignore

    def _contains(self, name: str) -> bool:
        return Path(name).resolve().is_relative_to(self._files)

    async def _check_event(self, receive: Receive) -> Receive:
        """Check the files of an event: gradio would fetch an image from any URL that it names."""
        message = await receive()  # the middleware passes the body in one piece
        try:
            names = list(paths_in(json.loads(message.get("body", b""))))
        except (ValueError, RecursionError):
            raise ApiError.invalid("the body is not valid JSON") from None
        if not all(isinstance(name, str) and self._contains(name) for name in names):
            raise ApiError(403, "an event may name only uploads and thumbnails")
        messages = iter([message])

        async def replay() -> MutableMapping[str, Any]:
            for first in messages:
                return first
            return await receive()

        return replay


def paths_in(value: Any) -> Any:
    """All paths in the JSON of an event."""
    if isinstance(value, dict):
        if value.get("path") is not None:
            yield value["path"]
        for inner in value.values():
            yield from paths_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from paths_in(inner)


def _with_headers(send: Send, policy: str) -> Send:
    extra = [
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        # Not no-referrer: with that a browser sends the login form without its origin.
        (b"referrer-policy", b"same-origin"),
    ]

    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return sent


def delete_oldest(folder: Path, held_bytes: int = HELD_BYTES) -> None:
    """Delete the oldest files until the others take at most `held_bytes`."""
    files = []
    for file in folder.rglob("*"):
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


def _document(root: Path, search: SearchFunction, request: Request) -> Response:
    """The PDF of a document with pages in the index; no other file of its folder is sent.

    Starlette runs it on a thread: a Word file may have to be converted first.
    """
    path = request.path_params["path"]
    try:
        file = inside(root, path) if search.holds(path) else None
        if file is None or not file.is_file():
            raise ApiError(404, "no such document in the index")
        pdf = pdf_of(file)
    except (DataError, ValueError) as error:
        raise ApiError(404, "no such document in the index") from error
    name = file.with_suffix(".pdf").name
    return FileResponse(
        pdf, media_type="application/pdf", filename=name, content_disposition_type="inline"
    )


# ---------------------------------------------------------------------- login


async def _to_page(request: Request) -> Response:
    return RedirectResponse(f"{PAGE}/", 303)


async def _login(page_auth: PageAuth, request: Request) -> Response:
    if page_auth.api_key is None:
        return await _to_page(request)
    if request.method == "GET":
        return _form()
    fields = parse_qs((await request.body()).decode("utf-8", "replace"))
    cookie = page_auth.cookie(fields.get("key", [""])[0])
    if cookie is None:
        await asyncio.sleep(WRONG_KEY_SECONDS)
        return _form("Wrong API key.")
    response = await _to_page(request)
    response.headers["Set-Cookie"] = cookie
    return response


def _form(error: str = "") -> Response:
    page = (HERE / "login.html").read_text(encoding="utf-8")
    alert = f'<p role="alert">{escape(error)}</p>' if error else ""
    return HTMLResponse(
        page.replace("<!-- error -->", alert).replace("<!-- icon -->", ICON), 401 if error else 200
    )
