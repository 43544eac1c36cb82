"""Access control of the web page: who may open it, and which of gradio's routes can be reached.

A browser cannot send the API key as a header, so a visitor types it once into a form, and a cookie
replaces it from then on. The cookie is valid for the page only; all other routes still require the
header. Only the gradio routes that the page needs are allowed: others fetch URLs, run code or read
files, and must not be reachable here.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from cafe.serving.errors import ApiError

PAGE = "/ui"
LOGIN = f"{PAGE}/login"
UPLOAD = f"{PAGE}/gradio_api/upload"
LOGIN_BYTES = 4096
COOKIE = "cafe_session"

_READ = re.compile(
    rf"/|{PAGE}(/|/login|/config|/theme\.css|/favicon\.ico|/manifest\.json"
    r"|/(assets|static|svelte)/.+|/document/.+"
    r"|/gradio_api/(file=.+|queue/data|upload_progress|startup-events|app_id))?"
)
_WRITE = re.compile(rf"{PAGE}(/login|/gradio_api/(queue/join|upload|cancel|reset))")


@dataclass(frozen=True, slots=True)
class PageAuth:
    """Checks requests to the web page.

    api_key   the key that the login form asks for; None: no login
    """

    api_key: str | None = None
    _session: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    def covers(self, path: str) -> bool:
        """Whether `path` belongs to the web page."""
        return path in ("/", PAGE) or path.startswith(f"{PAGE}/")

    def check(self, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        """Check one request to the page.

        A page of another site can make a browser submit a form here, with or without the cookie.

        Raises:
            ApiError: 403 for a request from another site's page, 303 (to the login form) or 401
                without a valid cookie, 404 for a route that the page does not need.
        """
        reads = method in ("GET", "HEAD")
        if not reads and not _same_site(headers):
            raise ApiError(403, "cross-site request refused")
        if path != LOGIN and not self._has_session(headers):
            if reads and path in ("/", PAGE, f"{PAGE}/"):
                raise ApiError(303, "log in first", headers={"Location": LOGIN})
            raise ApiError(401, f"log in at {LOGIN} first", code="invalid_api_key")
        allowed = _READ if reads else _WRITE if method == "POST" else None
        if allowed is None or not allowed.fullmatch(path):
            raise ApiError(404, "not found")

    def cookie(self, key: str) -> str | None:
        """The Set-Cookie value for a browser that sent `key`; None if the key is wrong.

        It is valid until this process ends. SameSite=Strict: the browser does not send it when a
        link on another site leads here.
        """
        if self.api_key is None or not hmac.compare_digest(key.encode(), self.api_key.encode()):
            return None
        return f"{COOKIE}={self._session}; Path=/; HttpOnly; SameSite=Strict"

    def _has_session(self, headers: dict[bytes, bytes]) -> bool:
        if self.api_key is None:
            return True
        cookies = headers.get(b"cookie", b"").split(b";")
        expected = f"{COOKIE}={self._session}".encode()
        return any(hmac.compare_digest(cookie.strip(), expected) for cookie in cookies)


def _same_site(headers: dict[bytes, bytes]) -> bool:
    """Programs send no Origin header; a browser sends one with every request but GET."""
    origin = headers.get(b"origin")
    host = headers.get(b"host", b"").decode("latin-1")
    return origin is None or urlsplit(origin.decode("latin-1")).netloc.lower() == host.lower()
