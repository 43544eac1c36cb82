"""Which targets and negatives are the same: by what they say and show."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cafe.types import Conversation, Image, Stored, Video


def identity(conversation: Conversation | None) -> str:
    """Equal for conversations that say and show the same, in every process and run."""
    parts = [p for message in conversation or () for p in message.content]
    return "\x1f".join(p if isinstance(p, str) else f"\x1e{_shown(p)}" for p in parts)


def _shown(part: Image | Video) -> str:
    """What names a picture: its path, else its content (an address differs from run to run)."""
    match part.source:
        case str() | Path():
            return str(part.source)
        case Stored():
            return part.source.name
        case bytes():
            content = [part.source]
        case tuple():
            content = [f.tobytes() if not isinstance(f, Path) else bytes(f) for f in part.source]
        case _:
            content = [part.source.tobytes(), str(part.source.size).encode()]
    return hashlib.blake2b(b"".join(content), digest_size=16).hexdigest()


def hashes(identities: Sequence[str]) -> Tensor:
    """Strings to int64, the same in every process (Python's own hash is salted)."""
    digests = [hashlib.blake2b(i.encode(), digest_size=8).digest() for i in identities]
    return torch.tensor([int.from_bytes(d, "big", signed=True) for d in digests], dtype=torch.long)
