"""What was read of images before: the beginnings of prompts, up to the end of their last image.

Several questions about one image begin alike: system turn, image, and what stands between. Their
keys and values are equal, so they are read once and kept, the least recently used ones given up
first when a bound on memory is reached.

Images are told apart by `Image.digest`, which whoever makes it must keep apart for clients that may
not learn of each other's images (`cafe.serving.content`). An image without a digest is never kept.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cafe.model.row_cache import LayerKeys
from cafe.types import Conversation, Image

PREFIX_BYTES = 256 * 2**20
"""What a server keeps, if nothing else is said."""

Digests = tuple[str, ...]
"""Of all images of a prompt, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """The beginning of a prompt, as it was read.

    images   whose beginning it is
    tokens   their number
    layers   keys and values of each layer
    """

    images: Digests
    tokens: int
    layers: Sequence[LayerKeys]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for pair in self.layers if pair is not None for x in pair)


class PrefixCache:
    """Prefixes by what they are read from; for one thread."""

    def __init__(self, max_bytes: int) -> None:
        """Keep at most `max_bytes` of keys and values."""
        self._max_bytes = max_bytes
        self._prefixes: OrderedDict[bytes, Prefix] = OrderedDict()
        self._images: Counter[Digests] = Counter()
        self.bytes = self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._prefixes)

    def knows(self, images: Digests) -> bool:
        """Whether some prefix with exactly these images is kept."""
        return self._images[images] > 0

    def find(self, key: bytes) -> Prefix | None:
        """The prefix of a key, which becomes the most recently used one."""
        found = self._prefixes.get(key)
        if found is not None:
            self._prefixes.move_to_end(key)
            self.hits += 1
        return found

    def add(self, key: bytes, prefix: Prefix) -> None:
        """Keep a prefix that was read, if it is not larger than everything that may be kept."""
        self.misses += 1
        if prefix.bytes > self._max_bytes or key in self._prefixes:
            return
        while self.bytes + prefix.bytes > self._max_bytes:
            _, oldest = self._prefixes.popitem(last=False)
            self.bytes -= oldest.bytes
            self._images[oldest.images] -= 1
            if not self._images[oldest.images]:
                del self._images[oldest.images]
        self._prefixes[key] = prefix
        self._images[prefix.images] += 1
        self.bytes += prefix.bytes


def image_digests(conversation: Conversation) -> Digests:
    """The digests of all images of a prompt; empty if it has none, or one without a digest."""
    parts = [p for message in conversation for p in message.content if not isinstance(p, str)]
    digests = [part.digest for part in parts if isinstance(part, Image)]
    known = tuple(digest for digest in digests if digest is not None)
    return known if len(known) == len(parts) else ()


def prefix_key(images: Digests, tokens: Sequence[int] | np.ndarray) -> bytes:
    """The key of a beginning: its images and its tokens, placeholders included."""
    state = hashlib.blake2b(digest_size=32)
    for digest in images:
        state.update(len(digest).to_bytes(4, "little") + digest.encode())
    state.update(np.asarray(tokens, dtype="<i8").tobytes())
    return state.digest()
