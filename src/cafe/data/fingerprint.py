"""A cheap fingerprint of the examples of a source, which tells data sets apart.

It covers the texts of some thousand examples and the sizes of some of their image files; no image
is opened. Folders do not count, so data that were moved are the same data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from cafe.types import Conversation, Example, Media, StoredFile

_EXAMPLES = 10_000  # number whose texts and image names are read, evenly spaced
_SIZES = 200  # number of these whose image files' sizes are read
_HEAD_BYTES = 4096  # of an image that is in memory
_DIGEST_BYTES = 16


def fingerprint(examples: Sequence[Example]) -> str:
    """Equal for the same examples in the same order."""
    digest = hashlib.blake2b(str(len(examples)).encode(), digest_size=_DIGEST_BYTES)
    chosen = examples[:: max(1, -(-len(examples) // _EXAMPLES))]
    sized = max(1, -(-len(chosen) // _SIZES))
    for number, example in enumerate(chosen):
        for part in _parts(example, sizes=number % sized == 0):
            digest.update(f"{len(part)} ".encode() + part)
    return digest.hexdigest()


def _parts(example: Example, *, sizes: bool) -> list[bytes]:
    """All texts and images of the example. Its id does not count, as it is not trained on."""
    sides: list[Conversation] = [s for s in (example.query, example.target) if s is not None]
    parts = [str((len(sides), len(example.negatives), len(example.dialogues))).encode()]
    parts += [] if example.scores is None else [str(example.scores).encode()]
    for conversation in example.conversations:
        for message in conversation:
            parts.append(message.role.encode())
            parts += [repr(call).encode() for call in message.calls]
            for part in message.content:
                if isinstance(part, str):
                    parts.append(part.encode(errors="surrogatepass"))
                else:
                    parts.append(_shown(part, sizes=sizes))
    return parts


def _shown(part: Media, *, sizes: bool) -> bytes:
    """The name and size of an image file, or the beginning of an image in memory."""
    match part.source:
        case str() | Path():
            size = _size(Path(part.source)) if sizes else 0
            return f"{Path(part.source).name} {size}".encode(errors="surrogatepass")
        case StoredFile():
            return part.source.name.rpartition("/")[2].encode(errors="surrogatepass")
        case bytes():
            return f"{len(part.source)} ".encode() + part.source[:_HEAD_BYTES]
        case tuple():
            names = [frame.name if isinstance(frame, Path) else frame.size for frame in part.source]
            return str(names).encode(errors="surrogatepass")
        case _:
            return str(part.source.size).encode()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
