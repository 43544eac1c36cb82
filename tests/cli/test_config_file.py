"""`cafe serve --config`: options from a file, whose mistakes are named."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cafe.cli import app


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `serve` is called with."""
    calls: list[dict[str, Any]] = []
    stand_in = types.ModuleType("cafe.serving.run")
    stand_in.serve = lambda model, **fields: calls.append({"model": model} | fields)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cafe.serving.run", stand_in)
    return calls


def test_the_file_gives_options_and_the_command_line_wins(
    served: list[dict[str, Any]], tmp_path: Path
):
    file = tmp_path / "serve.yaml"
    file.write_text("model: tiny\nport: 8123\nmax-batch: 3\nui: true\nhost: null\n")
    result = CliRunner().invoke(app, ["serve", "--config", str(file), "--max-batch", "5"])
    assert result.exception is None, result.output
    (call,) = served
    assert (call["model"], call["port"], call["max_batch"], call["ui"]) == ("tiny", 8123, 5, True)
    assert call["host"] == "127.0.0.1"
    assert CliRunner().invoke(app, ["serve", "other", "--config", str(file)]).exception is None
    assert served[1]["model"] == "other"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("porf: 1", "unknown key porf; did you mean port?"),
        ("port: high", "port is 'high': Input should be a valid integer"),
        ("port: 99999", "port is 99999: Input should be less than"),
        ("port: [1]", "port is [1], expected one value"),
        ("ui: 1", "ui is 1, expected true or false"),
        ("max_batch: true", "max_batch is True, expected one value"),
        ("log_level: loud", "log_level is 'loud': "),
        ("- port", "give options and their values"),
        ("a: [", "not valid YAML"),
    ],
)
def test_mistakes_name_the_file_and_the_key(
    served: list[dict[str, Any]], tmp_path: Path, text: str, reason: str
):
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    result = CliRunner().invoke(app, ["serve", "tiny", "--config", str(file)])
    assert str(result.exception).startswith(f"{file}: {reason}")
    assert served == []
    missing = CliRunner().invoke(app, ["serve", "tiny", "--config", str(tmp_path / "no.yaml")])
    assert "no.yaml: cannot be read" in str(missing.exception)
