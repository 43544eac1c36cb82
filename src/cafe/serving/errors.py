"""Errors of the HTTP API: a status, and a body in the shape of OpenAI's errors.

{"error": {"message": "…", "type": "invalid_request_error", "param": "input", "code": null}}
"""

from __future__ import annotations

import json
from typing import Any, Self

from starlette.responses import Response

from cafe.errors import CafeError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
RETRY_SECONDS = 1


class ApiError(CafeError):
    """A request that is refused.

    status    HTTP status
    param     the field of the request that is wrong
    code      a machine-readable word for the error
    headers   additional response headers
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = headers or {}

    @classmethod
    def invalid(cls, message: str, param: str | None = None, code: str | None = None) -> Self:
        """400: the request is wrong."""
        return cls(400, message, param=param, code=code)

    @classmethod
    def busy(cls, reason: str) -> Self:
        """429: there are too many requests; a later one may succeed."""
        return cls._retry_later(429, f"{reason}; try again in a moment", "busy")

    @classmethod
    def unavailable(cls, reason: str, code: str) -> Self:
        """503: the server cannot answer now."""
        return cls._retry_later(503, f"{reason}; try again in a moment", code)

    @classmethod
    def _retry_later(cls, status: int, message: str, code: str) -> Self:
        return cls(status, message, code=code, headers={"Retry-After": str(RETRY_SECONDS)})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body, in the shape of OpenAI's errors."""
        kind = TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`value` as ASCII JSON: a message may quote an unpaired surrogate, which UTF-8 lacks."""
    return Response(json.dumps(value), status, headers, media_type="application/json")
