"""Errors of other libraries, quoted in ours."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from cafe.errors import first_line, printable
from cafe.types import Example, Hit, Message, user


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one line"), "one line"),
        (ValueError("\n  the first\nthe second"), "the first"),
        (OSError(), "OSError"),
        (RuntimeError(" \n"), "RuntimeError"),
    ],
)
def test_an_error_is_quoted_in_one_line(error: Exception, line: str):
    assert first_line(error) == line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ATTACK = "a mug\x1b]0;title\x07\x1b[2J\x9b1m\rhidden\n\tend"


def test_control_characters_are_escaped_on_a_terminal() -> None:
    escaped = "a mug\\x1b]0;title\\x07\\x1b[2J\\x9b1m\\x0dhidden\n\tend"
    assert printable(ATTACK, Terminal()) == escaped
    assert printable(ATTACK, io.StringIO()) == ATTACK


def test_commands_escape_what_they_print(small_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from cafe.cli import data, search
    from cafe.retrieval.search import RankedHit, SearchAnswer

    shown = Terminal()
    example = Example("a", dialogues=((*user("Say it."), Message("assistant", (ATTACK,))),))
    data.preview(Console(file=shown, force_terminal=True), small_model.collator, example)
    monkeypatch.setattr("sys.stdout", shown)
    hit = RankedHit(Hit(ATTACK, 0.5, {"text": ATTACK}), None)
    search._show([hit], SearchAnswer(ATTACK, [1]))
    text = shown.getvalue()
    assert "\\x1b]0;title" in text
    assert not any(code in text for code in ("\x1b]0", "\x1b[2J", "\x9b", "\x07", "\r"))
