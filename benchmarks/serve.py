"""Throughput of one server for many concurrent clients, against a single client.

    python benchmarks/serve.py [--model tiny] [--clients 32] [--seconds 20] [--against TREE]

mixture  Each client sends the same mixture, the next request once the last one is answered:
         embeddings of two texts and of one image, then a question about an image. First there is
         one client, then there are `--clients`; `ratio` is embeddings per second of many clients
         divided by that of one.
chat     Each of `--clients` clients asks about images of its own, for answers of 8 to 256 tokens,
         which do not end before (their end token is ruled out). Then the same beside two clients
         that embed a text 20 times a second in total.
images   16 questions that are asked at the same moment about one image, and about 16 images; none
         of them has been seen before. The answers have 2 tokens, as yes and no have.

The server, `cafe serve`, runs in its own process. `--against` names another source tree of cafe (a
`git worktree` of an earlier commit): chat and images are run with its server, too, before and after
this tree's, so that both meet the same machine. If any request fails, the exit code is 1.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openai
import PIL.Image

SHORTEST, LONGEST = 8, 256
"""Answers of the chat clients, in tokens."""

QUESTIONS = 16
QUESTION_TOKENS = 2
ROUNDS = 5


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


def messages(seed: int, text: str | None, side: int = 96) -> list[Any]:
    """A user message with an image, and a text if there is one."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise).resize((side, side)).save(buffer, "png")
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


@dataclass
class ChatMeasurements:
    """What one server did.

    tokens   generated per second by the chat clients
    p95      of embeddings beside chat, milliseconds
    one, many   seconds until 16 questions about one image, and about 16, are answered
    """

    tokens: float
    p95: float
    one: float
    many: float
    errors: list[str]

    def report(self, name: str) -> None:
        print(f"{name}: chat {self.tokens:.0f} tokens per second")
        print(f"  embeddings beside chat: p95 {self.p95:.0f} ms")
        print(f"  {QUESTIONS} questions: one image {self.one:.2f} s, {QUESTIONS} {self.many:.2f} s")
        print(f"  errors {len(self.errors)} {self.errors[:1] or ''}", flush=True)


@dataclass
class ChatBenchmark:
    """Chat against one server; `end` is the token that ends an answer."""

    client: openai.OpenAI
    model: str
    end: int
    clients: int
    errors: list[str] = field(default_factory=list)

    def measure(self) -> ChatMeasurements:
        self.questions([0] * 4, 0)  # warm up
        tokens = self.chat(1, 2)
        stop, seconds = threading.Event(), []
        embedding = [
            threading.Thread(target=self.embed, args=(stop, seconds), daemon=True) for _ in range(2)
        ]
        for thread in embedding:
            thread.start()
        self.chat(2, 1)
        stop.set()
        for thread in embedding:
            thread.join()
        one, many = [], []
        for i in range(1, ROUNDS + 1):
            one.append(self.questions([1000 * i] * QUESTIONS, 0))
            many.append(self.questions([1000 * i + 1 + n for n in range(QUESTIONS)], 0))
        p95 = float(np.percentile(np.array(seconds) * 1000, 95))
        return ChatMeasurements(
            tokens, p95, float(np.median(one)), float(np.median(many)), self.errors
        )

    def chat(self, seed: int, each: int) -> float:
        """Tokens per second of clients that ask for `each` answers, which differ in length."""
        lengths = np.random.default_rng(seed).integers(SHORTEST, LONGEST + 1, (self.clients, each))

        def one(number: int) -> None:
            for i, length in enumerate(lengths[number]):
                conversation = messages(seed * 10_000 + number * 10 + i, "Describe this image.")
                self.ask(conversation, int(length))

        return int(lengths.sum()) / timed(one, self.clients)

    def questions(self, images: Sequence[int], seed: int) -> float:
        """Seconds until questions about these images, asked at once, are answered."""
        asked = [
            messages(image, f"Is there an object of kind {n} in it?", 384)
            for n, image in enumerate(images, seed)
        ]
        return timed(lambda n: self.ask(asked[n], QUESTION_TOKENS), len(asked))

    def ask(self, conversation: list[Any], length: int) -> None:
        try:
            reply = self.client.chat.completions.create(
                model=self.model,
                messages=conversation,
                max_tokens=length,
                logit_bias={str(self.end): -100},
            )
            assert reply.usage is not None
            if reply.usage.completion_tokens != length:
                self.errors.append(f"{reply.usage.completion_tokens} tokens, not {length}")
        except openai.OpenAIError as error:
            self.errors.append(str(error))

    def embed(self, stop: threading.Event, seconds: list[float]) -> None:
        while not stop.wait(0.1):
            begin = time.perf_counter()
            try:
                self.client.embeddings.create(model=self.model, input="red cats at the top left")
            except openai.OpenAIError as error:
                self.errors.append(str(error))
            seconds.append(time.perf_counter() - begin)


def timed(work: Callable[[int], None], count: int) -> float:
    """Seconds that so many threads take, each with its number."""
    threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin


@contextmanager
def served(model: str, tree: Path | None = None) -> Iterator[tuple[openai.OpenAI, str]]:
    """A client of a server in its own process, of another source tree if there is one."""
    command = [sys.executable, "-m", "cafe", "serve", model, "--port", "0"]
    environment = os.environ | ({} if tree is None else {"PYTHONPATH": str(tree / "src")})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            url = next(line for line in server.stdout if " on http://" in line).split()[-1]
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
            yield client, client.models.list().data[0].id
        finally:
            server.terminate()
            print(f"exit code {server.wait(60)}")


def mixture(model: str, clients: int, seconds: float) -> list[str]:
    """Run the mixture; returns the errors."""
    with served(model) as (client, name):
        run(client, name, 4, 4.0)  # warm up
        alone = run(client, name, 1, seconds)
        alone.report("one at a time")
        many = run(client, name, clients, seconds)
        many.report(f"{clients} clients")
    print(f"ratio: {many.embeddings_per_second / alone.embeddings_per_second:.2f}")
    return alone.errors + many.errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0, help="of the mixture; 0: without it")
    parser.add_argument("--against", type=Path, metavar="TREE")
    arguments = parser.parse_args()
    errors: list[str] = []
    if arguments.seconds:
        errors += mixture(arguments.model, arguments.clients, arguments.seconds)

    from cafe.model.vlm import CAFe

    vlm = CAFe.from_pretrained(arguments.model)
    end = int(vlm.processor.tokenizer.convert_tokens_to_ids(vlm.collator.pooled_token))
    del vlm
    trees = [None] if arguments.against is None else [arguments.against, None, arguments.against]
    measured: list[ChatMeasurements] = []
    for tree in trees:
        with served(arguments.model, tree) as (client, name):
            measured.append(ChatBenchmark(client, name, end, arguments.clients).measure())
        measured[-1].report("this tree" if tree is None else str(tree))
        errors += measured[-1].errors
    own = measured[len(measured) // 2]
    print(f"images_ratio: {own.many / own.one:.2f}")
    if arguments.against is not None:
        for before in (measured[0], measured[2]):
            print(f"chat_ratio: {own.tokens / before.tokens:.2f}")
            print(f"one_image_ratio: {before.one / own.one:.2f}")
            print(f"p95_ratio: {own.p95 / before.p95:.2f}")
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
