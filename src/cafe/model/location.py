"""From what a user calls a model to the directory that holds it: "tiny", a directory, a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from cafe.errors import CheckpointError
from cafe.model.tiny import TINY_DIR

HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"]
"""What is downloaded of a hub model: no pickled weights, no code."""


def locate(name_or_dir: str | Path, kind: str = "model") -> Path:
    """The directory of `name_or_dir`, downloaded if it is a hub id (owner/name).

    kind   what an error calls it
    One request, so that without a network it fails at once: transformers alone would ask for a
    dozen files, each with its retries. Raises CheckpointError when nothing is there.
    """
    source = str(name_or_dir)
    name = f"{kind} {source!r}"
    path = TINY_DIR if source == "tiny" else Path(source).expanduser()
    if path.is_dir():
        return path
    if path == TINY_DIR or path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise CheckpointError(f"{name}: no such directory; give one, or a hub id (owner/name)")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=HUB_FILES))
    except Exception as error:  # no network, no such model, no access, full disk, …
        raise CheckpointError(
            f"{name}: neither a directory here nor found on the hub ({first_line(error)})"
        ) from error


def lasting_name(name_or_dir: str | Path) -> str:
    """`name_or_dir` as another file may refer to it: a directory's path is made absolute."""
    path = Path(name_or_dir).expanduser()
    return str(path.absolute()) if path.is_dir() and str(name_or_dir) != "tiny" else str(path)


def first_line(error: BaseException) -> str:
    """What other people's errors say, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
