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
