"""The web page's door: who comes in from a browser, and how much of gradio can be reached.

A browser cannot send the API key as a header, so the key is typed once into a form and a cookie
stands for it from then on. The cookie opens the page only; the other routes still want the header.
Of gradio's routes only those are let through that the page needs: others fetch addresses, run code
or read files, and none of that is anybody's business here.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from cafe.serve.refusal import Refused

PAGE = "/ui"
LOGIN = f"{PAGE}/login"
LOGIN_BYTES = 4096
COOKIE = "cafe_session"

_READ = re.compile(
    rf"/|{PAGE}(/|/login|/config|/theme\.css|/favicon\.ico|/manifest\.json"
    r"|/(assets|static|svelte)/.+"
    r"|/gradio_api/(file=.+|queue/data|upload_progress|startup-events|app_id))?"
)
_WRITE = re.compile(rf"{PAGE}(/login|/gradio_api/(queue/join|upload|cancel|reset))")


@dataclass(frozen=True, slots=True)
class Door:
    """api_key: what the form asks for; None: nothing is asked."""

    api_key: str | None = None
    _session: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    def leads_to(self, path: str) -> bool:
        return path in ("/", PAGE) or path.startswith(f"{PAGE}/")

    def check(self, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        """Raises Refused: 403 for another site's page, 303 to the form, 404 for all but the page.

        A page on another site can make a browser send a form here, cookie or not.
        """
        reads = method in ("GET", "HEAD")
        if not reads and not _same_site(headers):
            raise Refused(403, "this request comes from another site's page")
        if path != LOGIN and not self._known(headers):
            if reads and path in ("/", PAGE, f"{PAGE}/"):
                raise Refused(303, "give the key first", headers={"Location": LOGIN})
            raise Refused(401, f"give the key first, at {LOGIN}", code="invalid_api_key")
        known = _READ if reads else _WRITE if method == "POST" else None
        if known is None or not known.fullmatch(path):
            raise Refused(404, "there is nothing at this address")

    def cookie(self, key: str) -> str | None:
        """The header that lets a browser in for as long as this process lives; None: wrong key.

        Strict: it is not sent when another site leads here.
        """
        if self.api_key is None or not hmac.compare_digest(key.encode(), self.api_key.encode()):
            return None
        return f"{COOKIE}={self._session}; Path=/; HttpOnly; SameSite=Strict"

    def _known(self, headers: dict[bytes, bytes]) -> bool:
        if self.api_key is None:
            return True
        given = headers.get(b"cookie", b"").split(b";")
        right = f"{COOKIE}={self._session}".encode()
        return any(hmac.compare_digest(cookie.strip(), right) for cookie in given)


def _same_site(headers: dict[bytes, bytes]) -> bool:
    """Programs send no Origin; a browser sends one with everything but GET."""
    origin = headers.get(b"origin")
    host = headers.get(b"host", b"").decode("latin-1")
    return origin is None or urlsplit(origin.decode("latin-1")).netloc.lower() == host.lower()
