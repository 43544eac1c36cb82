"""`start_server`: a server in a process of its own, and a process that dies before it is ready."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cafe.errors import CafeError
from cafe.serving.background import start_server
from helpers.fakes import request
from helpers.processes import environment_with_helpers

pytestmark = pytest.mark.slow

UNGUARDED = """
from pathlib import Path
from cafe.errors import CafeError
from cafe.serving.background import start_server

Path("made").mkdir()  # fails when the new process imports this script
try:
    start_server("tiny", port=0)
except CafeError as error:
    print(error)
"""


def test_it_serves_until_the_block_ends(small_dir: Path):
    lines: list[str] = []
    with start_server(small_dir, port=0, report=lines.append) as server:
        assert request(server.url, "/ready")[0] == 200
        assert server.exitcode is None
    assert server.exitcode == 0
    assert lines[0] == f"loading {small_dir}"
    assert lines[1] == f"serving {small_dir.name} on {server.url}"


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("not-there", {}, "no such directory"),
        ("tiny", {"host": "0.0.0.0"}, "reachable from other machines"),
    ],
)
def test_an_error_of_the_server_is_raised_here(model: str, options: dict[str, str], says: str):
    with pytest.raises(CafeError, match=says):
        start_server(model, port=0, **options)


def test_a_script_without_the_guard_is_told_so_at_once(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment_with_helpers(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "ended before it was ready (exit code 1)" in done.stdout
    assert 'if __name__ == "__main__":' in done.stdout
    assert "FileExistsError" in done.stderr
