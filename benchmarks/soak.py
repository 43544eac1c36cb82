"""A server and an index under faults for several minutes: nothing crashes, leaks or gets lost.

    python benchmarks/soak.py [--minutes 10] [--model tiny] [--seed 0]

Well-behaved and faulty clients send requests to one `cafe serve --index DIR` concurrently: clients
that disconnect, malformed JSON, bodies of 50 MB, broken images, and the attacks of
`soak_attacks.py`. Meanwhile the indexed folder
changes, and runs of `cafe index` on it are killed (SIGKILL) and restarted. Violations, with exit
code 1:

    a wrong response (any 500; a valid request that is refused, other than with 429 or 503)
    a server that exits, writes a traceback, keeps work after all clients left, or does not drain
    resident memory at the end more than 5 % above that after the warm-up (medians over a tenth of
    the time)
    a row that is lost, duplicated or stale, or whose vector is not that of its image

All traffic stays on loopback, and all files in a temporary folder.
"""

from __future__ import annotations

import argparse
import os
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
from soak_attacks import ATTACKS
from soak_index import Folder, Runs, churn, differences, index_once

GROWTH = 0.05
WARM_UP = 0.2
WINDOW = 0.1
SETTLE_SECONDS = 60
CLIENTS: list[tuple[clients.Client, int, float]] = [
    (clients.good, 4, 0.05),
    (clients.vanishes, 1, 0.3),
    (clients.malformed, 1, 0.3),
    (clients.broken_image, 1, 0.3),
    (clients.large, 1, 5.0),
    *ATTACKS,
]
"""Function, number of clients, and seconds between two requests of one client."""


@dataclass
class Observations:
    """What was observed: requests by kind, violations, (seconds, bytes) of resident memory, and the
    longest request of each kind, in seconds.
    """

    requests: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    longest: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, seconds: float, problem: str | None) -> None:
        with self.lock:
            self.requests[kind] += 1
            self.longest[kind] = max(seconds, self.longest.get(kind, 0.0))
            if problem is not None:
                self.violations.append(f"{kind}: {problem}")


def keep_requesting(
    client: clients.Client,
    host: str,
    pause: float,
    seed: int,
    stop: threading.Event,
    observed: Observations,
) -> None:
    chance = random.Random(seed)
    wait = 0.0  # every kind has been there once when the warm-up ends, also the rare ones
    while not stop.wait(wait):
        wait = pause * (0.5 + chance.random())
        begin = time.monotonic()
        try:
            problem = client(host, chance)
        except Exception as error:  # whatever it is, the server did not respond properly
            problem = f"{type(error).__name__}: {error}"
        observed.note(client.__name__, time.monotonic() - begin, problem)


def watch(pid: int, begin: float, stop: threading.Event, observed: Observations) -> None:
    """The server's resident memory, twice a second."""
    while not stop.wait(0.5):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        line = next((x for x in status.splitlines() if x.startswith("VmRSS")), None)
        if line is not None:
            observed.memory.append((time.monotonic() - begin, int(line.split()[1]) * 1024))


@contextmanager
def serving(model: str, index: Path, log: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server, and its host:port."""
    arguments = [model, "--index", str(index), "--port", "0"]
    command = [sys.executable, "-m", "cafe", "serve", *arguments]
    environment = {**os.environ, "CAFE_API_KEY": clients.KEY}
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as server,
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
    """Median bytes in the window after the warm-up and in the last one, and the relative growth."""

    def median(begin: float) -> float:
        inside = [b for t, b in memory if begin * seconds <= t < (begin + WINDOW) * seconds]
        return statistics.median(inside) if inside else float("nan")

    first, last = median(WARM_UP), median(1 - WINDOW)
    return first, last, last / first - 1


def idle(host: str) -> str | None:
    """None once the server has no work left, otherwise what it still holds."""
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
    """Send SIGTERM; the problems with how the server ends and with its log."""
    server.terminate()
    try:
        code = server.wait(SETTLE_SECONDS)
    except subprocess.TimeoutExpired:
        return ["it does not exit after SIGTERM"]
    problems = [] if code == 0 else [f"its exit code is {code}"]
    text = log.read_text()
    return problems + ([f"it wrote a traceback: …{text[-600:]}"] if "Traceback" in text else [])


def soak(model: str, seconds: float, seed: int, folder: Path) -> bool:
    """Run everything in `folder`, print a summary, and return whether there was no violation."""
    photos = Folder(folder / "photos", random.Random(seed))
    photos.fill()
    uri, log = folder / "index", folder / "server.log"
    begin = time.monotonic()
    code, message = index_once(model, photos.path, uri)
    if code:
        raise SystemExit(f"the first cafe index failed: {message}")
    run_seconds = time.monotonic() - begin
    observed, runs, stop = Observations(), Runs(), threading.Event()
    with serving(model, uri, log) as (server, host):
        begin = time.monotonic()
        churning = (model, photos, uri, run_seconds, stop, runs)
        threads = [
            threading.Thread(target=watch, args=(server.pid, begin, stop, observed)),
            threading.Thread(target=churn, args=churning),
        ]
        for kind, (client, count, pause) in enumerate(CLIENTS):
            for n in range(count):
                arguments = (client, host, pause, 1000 * seed + 10 * kind + n, stop, observed)
                threads.append(threading.Thread(target=keep_requesting, args=arguments))
        for thread in threads:
            thread.start()
        while time.monotonic() - begin < seconds and server.poll() is None:
            time.sleep(0.5)
        stop.set()
        for thread in threads:
            thread.join()
        if server.poll() is not None:
            observed.violations.append(f"server: it exited on its own: {log.read_text()[-600:]}")
        else:
            held = idle(host)
            observed.violations += [] if held is None else [f"server: {held}"]
            observed.violations += [f"server: {x}" for x in ended(server, log)]
    code, message = index_once(model, photos.path, uri)
    observed.violations += [f"index: {problem}" for problem in runs.problems]
    if code:
        observed.violations.append(f"index: the last run failed: {message}")
    else:
        observed.violations += [f"index: {problem}" for problem in differences(model, photos, uri)]
    return summary(observed, runs, seconds, len(photos.good()))


def summary(observed: Observations, runs: Runs, seconds: float, rows: int) -> bool:
    first, last, grown = growth(observed.memory, seconds)
    if not grown <= GROWTH:  # "not", so that nan (not measured) is a violation as well
        observed.violations.append(f"memory: {grown:+.1%} after the warm-up, allowed {GROWTH:+.0%}")
    requests = ", ".join(f"{count} {kind}" for kind, count in sorted(observed.requests.items()))
    print(f"{seconds / 60:.1f} minutes; requests: {requests}")
    longest = ", ".join(f"{seconds:.1f} {kind}" for kind, seconds in observed.longest.items())
    print(f"longest request, in seconds: {longest}")
    print(f"cafe index: {runs.killed} runs killed, {runs.finished} finished; {rows} rows compared")
    print(f"resident memory: {first / 2**20:.0f} MiB, then {last / 2**20:.0f} MiB ({grown:+.2%})")
    for violation in observed.violations[:20]:
        print(f"VIOLATION {violation}")
    print(f"violations: {len(observed.violations)}")
    return not observed.violations


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
