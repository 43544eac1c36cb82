"""`cafe serve` as a process: its address, its end, and its errors at the start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cafe.model.vlm import CAFe
from cafe.serving.run import serve
from helpers.fakes import chat, request, wait_until

pytestmark = pytest.mark.slow

CAFE = [sys.executable, "-m", "cafe"]


@contextmanager
def process(model: str | Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server and its address."""
    command = [*CAFE, "serve", str(model), "--port", "0", *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    ) as run:
        try:
            assert run.stdout is not None
            lines = []
            for line in run.stdout:
                lines.append(line)
                if " on http://" in line:
                    break
            else:
                raise AssertionError("".join(lines))
            yield run, lines[-1].split()[-1]
        finally:
            run.kill()


def test_sigterm_finishes_running_answers_and_refuses_new_ones(small_dir: Path):
    """The small model is random: it writes until the limit."""
    with process(small_dir) as (run, url):
        assert request(url, "/ready")[0] == 200
        assert request(url, "/v1/models")[1]["data"][0]["id"] == small_dir.name
        replies: list[tuple[int, int]] = []

        def ask() -> None:
            status, reply, _ = request(url, "/v1/chat/completions", chat("a cat", max_tokens=300))
            replies.append((status, reply["usage"]["completion_tokens"]))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: "cafe_generating 1.0" in request(url, "/metrics")[1])
        run.send_signal(signal.SIGTERM)
        wait_until(lambda: request(url, "/v1/embeddings", {"input": "late"})[0] == 503)
        assert not replies, "it ended too early to show anything"
        asking.join(60)
        assert replies == [(200, 300)]
        assert run.wait(30) == 0


def test_sigterm_ends_an_idle_server_at_once(small_dir: Path):
    with process(small_dir, "--api-key", "word") as (run, url):
        assert request(url, "/v1/models")[0] == 401
        run.send_signal(signal.SIGINT)
        assert run.wait(30) == 0


def test_serve_blocks_until_a_signal_and_reports_its_address(small_dir: Path):
    """The function behind the command line, in this process."""
    lines: list[str] = []
    vectors: list[list[float]] = []

    def report(line: str) -> None:
        lines.append(line)
        if " on http://" in line:
            reply = request(line.split()[-1], "/v1/embeddings", {"input": "a cat"})[1]
            vectors.extend(row["embedding"] for row in reply["data"])
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    serve(small_dir, port=0, report=report)
    assert lines[0] == f"loading {small_dir}"
    assert lines[1].startswith(f"serving {small_dir.name} on http://127.0.0.1:")
    assert np.allclose(vectors, CAFe.from_pretrained(small_dir).encode(["a cat"]), atol=1e-5)
    assert signal.getsignal(signal.SIGTERM) is handler


def refused(*arguments: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [*CAFE, "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | (env or {}),
    )
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    return done.stderr


def test_the_server_listens_before_torch_is_imported():
    code = "import sys, cafe.serving.run; print(*{'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_model_that_is_not_there_is_one_line():
    assert "nowhere" in refused("./nowhere", "--port", "0")


def test_an_open_host_without_a_key_is_refused():
    assert "--api-key" in refused("tiny", "--host", "0.0.0.0")


def test_without_its_packages_it_says_how_to_get_them(tmp_path: Path):
    """As if uvicorn were not installed."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['uvicorn'] = None\n")
    line = refused("tiny", env={"PYTHONPATH": str(tmp_path)})
    assert "uvicorn" in line
    assert "pip install 'cafe-vlm[serve]'" in line
