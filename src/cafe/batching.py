"""Process many inputs: isolate the broken ones of a batch, and prefetch results in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import Generic, NamedTuple, TypeVar

from cafe.errors import DataError

T = TypeVar("T")
R = TypeVar("R")


class WithCaption(NamedTuple, Generic[R]):
    """A result, and what was written of its value before; None: nothing."""

    result: R
    caption: str | None


def encode_each(
    encode: Callable[[Sequence[T]], Iterable[R]], values: Sequence[T]
) -> tuple[dict[int, R], dict[int, DataError]]:
    """Encode `values` in batches, isolating those that `encode` rejects.

    A batch that is rejected is halved until the broken value is alone.

    Args:
        encode: Returns one result per value; a DataError rejects the whole batch.
        values: The values to encode.

    Returns:
        The results and the errors, each by index in `values`.
    """
    encoded: dict[int, R] = {}
    failures: dict[int, DataError] = {}
    parts = [range(len(values))] if values else []
    while parts:
        part = parts.pop()
        try:
            results = encode([values[i] for i in part])
        except DataError as error:
            if len(part) == 1:
                failures[part[0]] = error
            else:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
        else:
            encoded.update(zip(part, results, strict=True))
    return encoded, failures


def encode_each_captioned(
    encode: Callable[..., Iterable[R | WithCaption[R]]],
    values: Sequence[T],
    write_captions: Callable[[Sequence[T]], Sequence[str | None]] | None = None,
) -> tuple[dict[int, WithCaption[R]], dict[int, DataError]]:
    """`encode_each`, each value with a caption that is written first.

    Args:
        encode: As in `encode_each`; with captions it gets them as the keyword `caption`, one or
            None for each value, as `CAFe.encode` takes them.
        values: The values to encode.
        write_captions: Returns one caption or None per value; a DataError rejects the whole batch.
            None: there are no captions, or `encode` writes them and returns each `WithCaption`.

    Returns:
        The results with their captions, and the errors, each by index in `values`.
    """
    if write_captions is None:
        encoded, failures = encode_each(encode, values)
        return {i: _captioned(result, None) for i, result in encoded.items()}, failures
    captions, failures = encode_each(write_captions, values)
    kept = sorted(captions)

    def encode_pairs(pairs: Sequence[tuple[T, str | None]]) -> Iterable[R | WithCaption[R]]:
        return encode([value for value, _ in pairs], caption=[caption for _, caption in pairs])

    encoded, refused = encode_each(encode_pairs, [(values[i], captions[i]) for i in kept])
    results = {kept[i]: _captioned(one, captions[kept[i]]) for i, one in encoded.items()}
    return results, failures | {kept[i]: error for i, error in refused.items()}


def _captioned(result: R | WithCaption[R], caption: str | None) -> WithCaption[R]:
    return result if isinstance(result, WithCaption) else WithCaption(result, caption)


def prefetch_map(
    function: Callable[[T], R], items: Iterable[T], threads: int, begun: int | None = None
) -> Iterator[R]:
    """function(item) for each item, in order; threads work while the caller uses earlier results.

    An error is raised where its result would have come. Closing the iterator drops items that are
    not started and waits for those that are. Threads help where the function releases the GIL:
    reading, decoding, resizing, tokenizing. With one item, or without threads, all work is done in
    the caller's thread.

    Args:
        function: Called with each item.
        items: Consumed lazily.
        threads: Number of threads.
        begun: Maximum number of items that are started but not yet returned; None: `threads`.
    """
    remaining = iter(items)
    first = list(islice(remaining, 2))
    remaining = chain(first, remaining)
    if threads < 1 or len(first) < 2:
        yield from map(function, remaining)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="prefetch") as pool:
        pending: deque[Future[R]] = deque()
        try:
            for item in islice(remaining, begun or threads):
                pending.append(pool.submit(function, item))
            while pending:
                result = pending.popleft().result()
                for item in islice(remaining, 1):
                    pending.append(pool.submit(function, item))
                yield result
        finally:
            for future in pending:
                future.cancel()
