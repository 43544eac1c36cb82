"""The index part of the soak test (`soak.py`): a folder that changes, and runs that are killed."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cafe.index import Index
from cafe.model.vlm import CAFe
from soak_clients import image

START = 60
CHANGES = 12
BATCH = 4
TOLERANCE = 1e-4


@dataclass
class Runs:
    """Outcomes of the runs of `cafe index`."""

    finished: int = 0
    killed: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class Folder:
    """A folder of images; `change` adds, overwrites, renames, corrupts and deletes some."""

    path: Path
    chance: random.Random
    _next: int = 0

    def fill(self) -> None:
        self.path.mkdir()
        for _ in range(START):
            self._add()

    def change(self) -> None:
        for _ in range(CHANGES):
            files = sorted(self.path.iterdir())
            one = self.chance.choice(files)
            match self.chance.randrange(6):
                case 0 | 1:
                    self._add()
                case 2:
                    one.write_bytes(self._content())
                case 3:
                    one.rename(self.path / f"moved-{self._number()}.png")
                case 4:
                    one.write_bytes(b"not an image")
                case 5 if len(files) > START // 2:
                    one.unlink()

    def good(self) -> list[Path]:
        return [f for f in sorted(self.path.iterdir()) if f.read_bytes() != b"not an image"]

    def _add(self) -> None:
        (self.path / f"{self._number():05d}.png").write_bytes(self._content())

    def _content(self) -> bytes:
        return image(self._number())

    def _number(self) -> int:
        self._next += 1
        return self._next


def index_command(model: str, folder: Path, uri: Path) -> list[str]:
    arguments = [model, str(folder), "--to", str(uri), "--batch-size", str(BATCH)]
    return [sys.executable, "-m", "cafe", "index", *arguments]


def index_once(model: str, folder: Path, uri: Path) -> tuple[int, str]:
    """One complete run: its exit code and the last line of stderr."""
    process = subprocess.run(index_command(model, folder, uri), capture_output=True, text=True)
    return process.returncode, (process.stderr.strip().splitlines() or [""])[-1]


def churn(
    model: str, folder: Folder, uri: Path, run_seconds: float, stop: threading.Event, runs: Runs
) -> None:
    """Change the folder and index it, killing about two of three runs at a random moment."""
    while not stop.is_set():
        folder.change()
        command = index_command(model, folder.path, uri)
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            limit = folder.chance.random() * 1.5 * run_seconds
            begin = time.monotonic()
            while process.poll() is None and time.monotonic() - begin < limit:
                if stop.wait(0.1):
                    break
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            _, errors = process.communicate()
        if process.returncode == -signal.SIGKILL:
            runs.killed += 1
        elif process.returncode == 0:
            runs.finished += 1
        else:
            runs.problems.append(f"cafe index ended with {process.returncode}: {errors[-300:]}")


def differences(model: str, folder: Folder, uri: Path) -> list[str]:
    """How the index differs from its folder: lost, duplicated, stale and wrong rows."""
    index = Index.open(uri)
    rows = index._table.search().select(["id", "hash"]).to_arrow()
    ids = rows["id"].to_pylist()
    hashes = dict(zip(ids, rows["hash"].to_pylist(), strict=True))
    files = {file.name: file for file in folder.good()}
    problems = [f"row {id} occurs {n} times" for id, n in Counter(ids).items() if n > 1]
    problems += [f"row {id} is lost" for id in sorted(files.keys() - hashes.keys())]
    problems += [f"row {id} has no image" for id in sorted(hashes.keys() - files.keys())]
    both = sorted(files.keys() & hashes.keys())
    for id in both:
        digest = hashlib.blake2b(files[id].read_bytes(), digest_size=16).hexdigest()
        if digest != hashes[id]:
            problems.append(f"row {id} is of an older image")
    expected = CAFe.from_pretrained(model).encode([files[id] for id in both])
    stored = index.stored(both)
    for id, vector in zip(both, expected, strict=True):
        if np.linalg.norm(stored[id].vector - vector) > TOLERANCE:
            problems.append(f"row {id} has another vector than its image")
    return problems
