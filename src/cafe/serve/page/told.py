"""What the page tells a visitor, as HTML that a screen reader reads aloud when it changes."""

from __future__ import annotations

import logging
from html import escape
from typing import Literal

from cafe.serve.refusal import Refused

log = logging.getLogger(__name__)


def note(text: str, kind: Literal["note", "answer", "error"] = "note", busy: bool = False) -> str:
    """busy: more of it is to come."""
    role = "alert" if kind == "error" else "status"
    return f'<p class="{kind}" role="{role}" aria-busy="{str(busy).lower()}">{escape(text)}</p>'


def error(failure: Exception) -> str:
    """Why there is no answer. What is nobody's fault but ours goes to the log."""
    if not isinstance(failure, Refused):
        log.error("the page could not answer", exc_info=failure)
        return note("Something went wrong here. The server's log says what.", "error")
    told = str(failure).removeprefix(f"{failure.param}: ")  # a field's name helps programs only
    return note(told[:1].upper() + told[1:], "error")
