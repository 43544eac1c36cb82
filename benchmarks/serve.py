"""Throughput of one server for many concurrent clients, against a single client.

    python benchmarks/serve.py [--model tiny] [--clients 32] [--seconds 20]

Each client sends the same mixture, the next request once the last one is answered: embeddings of
two texts and of one image, then a question about an image. The server, `cafe serve`, runs in its
own process. First there is one client, then there are `--clients`; `ratio` is embeddings per second
of many clients divided by that of one. If any request fails, the exit code is 1.
"""

from __future__ import annotations

import argparse
import base64
import io
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openai
import PIL.Image


@dataclass
class Measurements:
    """What the clients of one run measured: seconds of every request by kind, and errors."""

    embedding: list[float] = field(default_factory=list)
    chat: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def embeddings_per_second(self) -> float:
        return len(self.embedding) / self.seconds

    def report(self, name: str) -> None:
        print(f"{name}: {self.embeddings_per_second:.1f} embeddings per second")
        for kind in ("embedding", "chat"):
            seconds = getattr(self, kind)
            if seconds:
                p50, p95 = np.percentile(np.array(seconds) * 1000, [50, 95])
                print(f"  {kind:<9} {len(seconds):6d} requests, p50 {p50:.0f} ms, p95 {p95:.0f} ms")
        print(f"  errors    {len(self.errors):6d} {self.errors[:1] or ''}")


def messages(seed: int, text: str | None) -> list[Any]:
    """A user message with an image, and a text if there is one."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise).resize((96, 96)).save(buffer, "png")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": parts + ([{"type": "text", "text": text}] if text else [])}]


def work(
    client: openai.OpenAI, model: str, number: int, until: float, measured: Measurements
) -> None:
    """One client: sends one request after another until the time is over."""
    turn = number  # clients start at different points of the mixture
    while time.perf_counter() < until:
        turn += 1
        seed = number * 10_000 + turn
        kind = turn % 4
        conversation = messages(seed, None if kind else "Describe this image.") if kind < 2 else []
        begin = time.perf_counter()  # without the time to create the image
        try:
            if kind == 0:
                client.chat.completions.create(model=model, messages=conversation, max_tokens=32)
            elif kind == 1:
                body = {"messages": conversation, "encoding_format": "base64"}
                client.post("/embeddings", body=body, cast_to=dict[str, Any])
            else:
                client.embeddings.create(model=model, input=f"{seed} red cats at the top left")
        except openai.OpenAIError as error:
            measured.errors.append(str(error))
        else:
            (measured.embedding if kind else measured.chat).append(time.perf_counter() - begin)


def run(client: openai.OpenAI, model: str, clients: int, seconds: float) -> Measurements:
    measured = Measurements()
    begin = time.perf_counter()
    threads = [
        threading.Thread(target=work, args=(client, model, n, begin + seconds, measured))
        for n in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    measured.seconds = time.perf_counter() - begin
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "cafe", "serve", arguments.model, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = next(line for line in server.stdout if " on http://" in line).split()[-1]
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
            name = client.models.list().data[0].id
            run(client, name, 4, 4.0)  # warm up
            alone = run(client, name, 1, arguments.seconds)
            alone.report("one at a time")
            many = run(client, name, arguments.clients, arguments.seconds)
            many.report(f"{arguments.clients} clients")
        finally:
            server.terminate()
            print(f"exit code {server.wait(60)}")
    print(f"ratio: {many.embeddings_per_second / alone.embeddings_per_second:.2f}")
    sys.exit(1 if alone.errors or many.errors else 0)


if __name__ == "__main__":
    main()
