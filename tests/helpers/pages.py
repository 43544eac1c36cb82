"""Runs the Python of a page in a process of its own, and reports what each block prints."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cafe

TESTS = Path(__file__).parent.parent
SECONDS = 280
_PYTHON = re.compile(r"^```python\n(.*?)^```\n(?:\n*```text\n(.*?)^```$)?", re.M | re.S)


@dataclass(frozen=True, slots=True)
class Block:
    """A block of Python.

    name    the page and the line where it starts, for tracebacks
    shown   the text block right after it; None: there is none
    """

    name: str
    code: str
    shown: str | None


def blocks(page: Path) -> list[Block]:
    """The blocks of Python of a page, in order."""
    text = page.read_text("utf-8")
    return [
        Block(f"{page.name}, line {text.count(chr(10), 0, m.start(1)) + 1}", m[1], m[2])
        for m in _PYTHON.finditer(text)
    ]


def printed(chosen: Sequence[Block], folder: Path) -> list[str]:
    """What each block writes to stdout, run one after another in `folder` with common names.

    Raises AssertionError, with the traceback, when a block fails.
    """
    task, result = folder / "blocks.json", folder / "printed.json"
    task.write_text(json.dumps([(block.name, block.code) for block in chosen]), "utf-8")
    paths = [str(TESTS), str(Path(cafe.__file__).parent.parent)]
    done = subprocess.run(
        [sys.executable, "-m", "helpers.pages", task, result],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text("utf-8"))


def _run(task: Path, result: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}  # so that a dataclass finds its module
    outputs = []
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        for name, code in json.loads(task.read_text("utf-8")):
            stdout.seek(0)
            stdout.truncate()
            exec(compile(code, name, "exec"), names)
            outputs.append(stdout.getvalue())
    result.write_text(json.dumps(outputs), "utf-8")


if __name__ == "__main__":  # a process that a block starts imports this module, and runs nothing
    _run(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
