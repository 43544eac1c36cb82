"""What a process holds of memory, and why it keeps what it has freed.

Reallocating costs more than the work that is done in it: every step frees and allocates the same
large blocks. glibc returns a freed block to the kernel, and the next one arrives as fresh pages,
each of which costs a page fault: on a two-core machine an elementwise product that writes 75 MB
took 46 ms with fresh pages and 10 ms with kept or huge ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from typing import Any

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # the maximum that glibc accepts
_NEVER = 2**31 - 1


def keep_memory() -> None:
    """Keep freed blocks below 32 MB, and let torch request huge pages for larger ones.

    This holds for the whole process and cannot be undone. glibc on Linux only; elsewhere nothing
    happens. Call it before torch allocates memory: torch reads its variable only once.
    """
    if not sys.platform.startswith("linux"):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)


def return_memory() -> None:
    """Return free blocks to the kernel now, also those that `keep_memory` keeps."""
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Return the blocks that are free already; takes milliseconds, and stops no other thread."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def peak_host_bytes() -> int | None:
    """Most memory that this process has held, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_device_bytes(device: Any) -> int | None:
    """Most memory that torch has held on a GPU, in bytes; None for another device."""
    if device.type != "cuda":
        return None
    import torch

    return torch.cuda.max_memory_allocated(device)
