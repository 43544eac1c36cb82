"""A server and an index under faults, for some minutes: nothing crashes, leaks, or is lost.

    python benchmarks/soak.py [--minutes 10] [--model tiny] [--seed 0]

One `cafe serve --index DIR` is asked by good clients and by bad ones, side by side: clients that
vanish, malformed JSON, bodies of 50 MB, broken pictures. Meanwhile the folder that the index is of
changes, and runs of `cafe index` over it are killed (SIGKILL) and begun again. Violations, with
exit code 1:

    an answer that the request does not deserve (any 500; a right request refused, but for 429/503)
    a server that ends, writes a traceback, keeps work when all clients are gone, or does not drain
    resident memory at the end more than 5 % above that after the warm-up (medians of a tenth)
    a row lost, duplicated, stale, or with another vector than its picture's

Everything stays on loopback and in a temporary folder.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import soak_clients as clients
from soak_index import Folder, Runs, churn, differences, index_once

GROWTH = 0.05
WARM_UP = 0.2
WINDOW = 0.1
SETTLE_SECONDS = 60
CLIENTS: list[tuple[clients.Client, int, float]] = [
    (clients.good, 4, 0.05),
    (clients.vanishes, 1, 0.3),
    (clients.malformed, 1, 0.3),
    (clients.broken_picture, 1, 0.3),
    (clients.large, 1, 5.0),
]
"""Kind, how many of it, and seconds between two requests of one."""


@dataclass
class Seen:
    """What happened: requests by kind, violations, and (seconds, bytes) of resident memory."""

    requests: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, problem: str | None) -> None:
        with self.lock:
            self.requests[kind] += 1
            if problem is not None:
                self.violations.append(f"{kind}: {problem}")


def keep_asking(
    client: clients.Client, host: str, pause: float, seed: int, stop: threading.Event, seen: Seen
) -> None:
    chance = random.Random(seed)
    while not stop.wait(pause * (0.5 + chance.random())):
        try:
            problem = client(host, chance)
        except Exception as error:  # whatever it is, the server did not answer
            problem = f"{type(error).__name__}: {error}"
        seen.note(client.__name__, problem)


def watch(pid: int, begin: float, stop: threading.Event, seen: Seen) -> None:
    """The server's resident memory, twice a second."""
    while not stop.wait(0.5):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        line = next((x for x in status.splitlines() if x.startswith("VmRSS")), None)
        if line is not None:
            seen.memory.append((time.monotonic() - begin, int(line.split()[1]) * 1024))


@contextmanager
def serving(model: str, index: Path, log: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server and its host:port."""
    arguments = [model, "--index", str(index), "--port", "0"]
    command = [sys.executable, "-m", "cafe", "serve", *arguments]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            line = next((x for x in server.stdout if " on http://" in x), None)
            if line is None:
                raise SystemExit(f"the server did not start: {log.read_text()[-1000:]}")
            yield server, line.split()[-1].removeprefix("http://")
        finally:
            server.kill()


def growth(memory: list[tuple[float, int]], seconds: float) -> tuple[float, float, float]:
    """Median bytes in the window after the warm-up and in the last one, and their ratio less 1."""

    def median(begin: float) -> float:
        inside = [b for t, b in memory if begin * seconds <= t < (begin + WINDOW) * seconds]
        return statistics.median(inside) if inside else float("nan")

    first, last = median(WARM_UP), median(1 - WINDOW)
    return first, last, last / first - 1


def idle(host: str) -> str | None:
    """Whether the server has let go of all work; what it still holds otherwise."""
    deadline = time.monotonic() + SETTLE_SECONDS
    held: list[str] = []
    while time.monotonic() < deadline:
        lines = clients.ask(host, "/metrics", None)[1].splitlines()
        work = [x for x in lines if x.startswith(("cafe_queue_depth{", "cafe_generating "))]
        held = [x for x in work if float(x.split()[-1]) > 0]
        if not held:
            return None
        time.sleep(0.5)
    return f"after {SETTLE_SECONDS} s without clients it still holds {held}"


def ended(server: subprocess.Popen[str], log: Path) -> list[str]:
    """SIGTERM; what is wrong with how the server ends, and what it wrote meanwhile."""
    server.terminate()
    try:
        code = server.wait(SETTLE_SECONDS)
    except subprocess.TimeoutExpired:
        return ["it does not end after SIGTERM"]
    wrong = [] if code == 0 else [f"its exit code is {code}"]
    text = log.read_text()
    return wrong + ([f"it wrote a traceback: …{text[-600:]}"] if "Traceback" in text else [])


def soak(model: str, seconds: float, seed: int, folder: Path) -> bool:
    """Run it all in `folder`; prints a summary and returns whether there was no violation."""
    photos = Folder(folder / "photos", random.Random(seed))
    photos.fill()
    uri, log = folder / "index", folder / "server.log"
    begin = time.monotonic()
    code, told = index_once(model, photos.path, uri)
    if code:
        raise SystemExit(f"the first cafe index failed: {told}")
    run_seconds = time.monotonic() - begin
    seen, runs, stop = Seen(), Runs(), threading.Event()
    with serving(model, uri, log) as (server, host):
        begin = time.monotonic()
        churning = (model, photos, uri, run_seconds, stop, runs)
        threads = [
            threading.Thread(target=watch, args=(server.pid, begin, stop, seen)),
            threading.Thread(target=churn, args=churning),
        ]
        for kind, (client, count, pause) in enumerate(CLIENTS):
            for n in range(count):
                arguments = (client, host, pause, 1000 * seed + 10 * kind + n, stop, seen)
                threads.append(threading.Thread(target=keep_asking, args=arguments))
        for thread in threads:
            thread.start()
        while time.monotonic() - begin < seconds and server.poll() is None:
            time.sleep(0.5)
        stop.set()
        for thread in threads:
            thread.join()
        if server.poll() is not None:
            seen.violations.append(f"server: it ended by itself: {log.read_text()[-600:]}")
        else:
            held = idle(host)
            seen.violations += [] if held is None else [f"server: {held}"]
            seen.violations += [f"server: {x}" for x in ended(server, log)]
    code, told = index_once(model, photos.path, uri)
    seen.violations += [f"index: {problem}" for problem in runs.problems]
    if code:
        seen.violations.append(f"index: the last run failed: {told}")
    else:
        seen.violations += [f"index: {problem}" for problem in differences(model, photos, uri)]
    return summary(seen, runs, seconds, len(photos.good()))


def summary(seen: Seen, runs: Runs, seconds: float, rows: int) -> bool:
    first, last, grown = growth(seen.memory, seconds)
    if not grown <= GROWTH:  # not measured is too much, too
        seen.violations.append(f"memory: {grown:+.1%} after the warm-up, allowed {GROWTH:+.0%}")
    asked = ", ".join(f"{count} {kind}" for kind, count in sorted(seen.requests.items()))
    print(f"{seconds / 60:.1f} minutes; requests: {asked}")
    print(f"cafe index: {runs.killed} runs killed, {runs.finished} finished; {rows} rows compared")
    print(f"resident memory: {first / 2**20:.0f} MiB, then {last / 2**20:.0f} MiB ({grown:+.2%})")
    for violation in seen.violations[:20]:
        print(f"VIOLATION {violation}")
    print(f"violations: {len(seen.violations)}")
    return not seen.violations


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        good = soak(options.model, 60 * options.minutes, options.seed, Path(folder))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
