"""Fields of a request that change nothing here: accepted, and named in the log and in a header.

What is named is a path without indices, such as "messages.content.cache_control". Names come from
the client, so they are few, short, and of plain characters.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

log = logging.getLogger(__name__)

HEADER = b"x-cafe-ignored-fields"
SCOPE_KEY = "cafe.ignored"
"""Where a request's scope has the names, in a list that the middleware sends as the header."""

MAX_NAMES = 20
MAX_LENGTH = 80
MAX_LOGGED = 200
"""So many names are logged in the life of a server: clients can invent any number of them."""

_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_.-]")


def ignored_fields(body: BaseModel) -> list[str]:
    """The unknown fields of a body and of the objects in it, each once, at most `MAX_NAMES`."""
    found: dict[str, None] = {}
    for name in _unknown(body, ""):
        found[_NOT_PLAIN.sub("?", name[:MAX_LENGTH]) or "?"] = None
        if len(found) == MAX_NAMES:
            break
    return list(found)


def _unknown(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, BaseModel):
        for name in value.model_extra or {}:
            yield f"{path}{name}"
        for name in value.model_fields_set - set(value.model_extra or {}):
            yield from _unknown(getattr(value, name), f"{path}{name}.")
    elif isinstance(value, list) and value and not isinstance(value[0], int):
        for item in value:
            if not isinstance(item, str):
                yield from _unknown(item, path)


class IgnoredFields:
    """Records what requests had ignored; logs each name once."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def record(self, body: BaseModel, scope: Any) -> None:
        """Name a body's unknown fields in the response header, and new ones in the log."""
        names = ignored_fields(body)
        scope[SCOPE_KEY].extend(names)
        new = [name for name in names if name not in self._logged]
        if new and len(self._logged) < MAX_LOGGED:
            self._logged.update(new)
            log.info("ignored fields of requests, which change nothing here: %s", ", ".join(new))
