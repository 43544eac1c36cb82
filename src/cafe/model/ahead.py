"""Work that threads do ahead of its use: pictures are decoded while the model computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(function: Callable[[T], R], items: Sequence[T], threads: int) -> Iterator[R]:
    """function(item) for each item, in order; each of `threads` threads is one item ahead.

    An error is raised where its result would have come. Threads help where the function leaves
    the interpreter: decoding, resizing, tokenising. With one item, or without threads, the caller
    does it all by itself.
    """
    if threads < 1 or len(items) < 2:
        yield from map(function, items)
        return
    left = iter(items)
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        begun: deque[Future[R]] = deque()
        try:
            for _, item in zip(range(threads), left, strict=False):
                begun.append(pool.submit(function, item))
            while begun:
                result = begun.popleft().result()
                for item in left:
                    begun.append(pool.submit(function, item))
                    break
                yield result
        finally:
            for future in begun:
                future.cancel()
