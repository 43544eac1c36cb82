"""Data workers, and the process that they work for."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil

_TRAINER = """
import sys, time, torch
from cafe.training.workers import loaded_by_workers

class Large(torch.utils.data.Dataset):
    # More than a pipe holds, so that a worker whose items nobody reads waits while it writes.
    def __len__(self):
        return 1000

    def __getitem__(self, number):
        return b"x" * (1 << 20)

with loaded_by_workers(Large(), range(1000), 2) as items:
    next(items)
    print("ready", flush=True)
    time.sleep(600)
"""


def test_workers_with_full_queues_end_with_a_trainer_that_is_killed() -> None:
    trainer = subprocess.Popen([sys.executable, "-c", _TRAINER], stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "ready\n"
        workers = psutil.Process(trainer.pid).children(recursive=True)
        assert len(workers) >= 2
        time.sleep(1)  # until the queues are full
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    for worker in alive:
        worker.kill()
    assert alive == []
