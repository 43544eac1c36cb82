"""One bar: on stderr, in a notebook's cell, and nothing where nothing can be drawn."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import rich.console

from cafe.progress import progress_bar


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "100", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)


def draw(**options: Any) -> None:
    with progress_bar("embed", 8, **options) as bar:
        bar.to(3)
        print("an answer")
        bar.more(2)


@pytest.mark.usefixtures("terminal")
def test_a_terminal_has_the_bar_on_stderr_and_stdout_keeps_what_is_printed(
    capsys: pytest.CaptureFixture[str],
):
    draw()
    out, err = capsys.readouterr()
    assert out == "an answer\n"
    assert "embed" in err
    assert "5/8" in err
    draw(show=False)
    assert capsys.readouterr() == ("an answer\n", "")


def test_a_log_file_has_nothing_or_the_last_line(capsys: pytest.CaptureFixture[str]):
    draw()
    assert capsys.readouterr() == ("an answer\n", "")
    draw(stays=True)
    out, err = capsys.readouterr()
    assert out == "an answer\n"
    (line,) = err.split("\n")[:1]
    assert line.split()[0] == "embed"
    assert "5/8" in line


def test_encode_draws_on_stderr(small_model: Any, capsys: pytest.CaptureFixture[str]):
    small_model.encode(["a cat", "a dog"], show_progress_bar=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/2" in err


@pytest.mark.filterwarnings("error")
def test_a_notebook_has_the_bar_in_its_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """rich's display for notebooks is chosen; IPython and ipywidgets are stand-ins here."""
    shown: list[Any] = []
    drawn: list[str] = []

    class Output:
        def clear_output(self, wait: bool) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    def module(name: str, **content: Any) -> None:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(content)

    display = SimpleNamespace(display=shown.append)
    module("IPython", display=display)
    module("IPython.display", display=shown.append)
    module("ipywidgets", Output=Output)
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setattr(
        "rich.jupyter.display", lambda segments, text: drawn.append(text), raising=True
    )
    draw(stays=True)
    assert isinstance(shown[0], Output)
    assert any("5/8" in text for text in drawn)
    assert "5/8" not in "".join(capsys.readouterr())
