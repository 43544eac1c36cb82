"""Freed memory stays with the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_TAKE_AND_FREE = """
import resource, sys, torch
from cafe.memory import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
for round in range(8):
    if round == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    taken = torch.ones(int(sys.argv[2]) << 18)  # so many MiB
    del taken
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
def test_memory_that_was_freed_is_kept() -> None:
    """Below glibc's limit a freed block is not given back to the kernel: no new page faults."""
    if not sys.platform.startswith("linux"):
        pytest.skip("glibc only")

    def page_faults(mode: str, megabytes: int) -> int:
        command = [sys.executable, "-c", _TAKE_AND_FREE, mode, str(megabytes)]
        environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return int(done.stdout)

    assert page_faults("keep", 16) < 2000
    assert page_faults("plain", 40) > 10_000, "page faults are not seen here"


_TAKE_MANY_AND_RETURN = """
from cafe.memory import keep_memory, return_memory
keep_memory()
import torch

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

torch.ones(1 << 18).sum()
taken = [torch.ones(1 << 20) for _ in range(64)]  # 4 MiB each
full = resident()
last = taken.pop()
del taken  # below the last one, where nothing is trimmed by itself
kept = resident()
return_memory()
print(full - kept, kept - resident())
"""


@pytest.mark.slow
def test_kept_memory_can_be_returned() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("glibc only")
    done = subprocess.run(
        [sys.executable, "-c", _TAKE_MANY_AND_RETURN], check=True, capture_output=True, text=True
    )
    freed, returned = map(int, done.stdout.split())
    assert freed < 50, "it was not kept"
    assert returned > 200
