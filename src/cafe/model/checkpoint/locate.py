"""Finds the directory of a model that is named by "tiny", a directory or a hub id."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePath

from cafe.errors import CheckpointError, DataError, first_line
from cafe.files import check_is_content
from cafe.model.tiny import TINY_DIR

HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"]
"""What is downloaded from the hub: no pickled weights, no code."""

HUB_CONFIGURATION = [pattern for pattern in HUB_FILES if pattern != "*.safetensors"]
"""The same without weights."""


WEIGHTS_INDEX = "model.safetensors.index.json"
"""transformers' list of the files that weights are in."""


def locate(
    name_or_dir: str | Path, kind: str = "model", *, files: Sequence[str] = HUB_FILES
) -> Path:
    """The directory of `name_or_dir`, downloaded if it is a hub id (owner/name).

    Without a network this fails fast, after one request: transformers would ask for a dozen files,
    with retries for each.

    Args:
        name_or_dir: "tiny", a directory, or a hub id.
        kind: what error messages call it.
        files: patterns of the files that are downloaded from the hub.

    Raises:
        CheckpointError: there is no such directory or hub id.
    """
    source = str(name_or_dir)
    name = f"{kind} {source!r}"
    path = TINY_DIR if source == "tiny" else Path(source).expanduser()
    if path.is_dir():
        check_downloaded(path, name)
        return path
    if path == TINY_DIR or path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise CheckpointError(f"{name}: no such directory; give one, or a hub id (owner/name)")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(files)))
    except Exception as error:  # no network, no such model, no access, full disk, …
        raise CheckpointError(
            f"{name}: neither a directory here nor found on the hub ({first_line(error)})"
        ) from error


def check_downloaded(path: Path, name: str) -> None:
    """Raises CheckpointError when a file of the directory is still a Git LFS pointer."""
    try:
        for pattern in HUB_FILES:
            for file in path.glob(pattern):
                check_is_content(file)
    except DataError as error:
        raise CheckpointError(f"{name}: {error}") from error


def check_index(path: Path, name: str) -> None:
    """Check that the index of a model's weights names files of its own directory.

    transformers opens whatever path stands there.

    Args:
        path: the directory.
        name: what error messages call the model.

    Raises:
        CheckpointError: it names another place, or cannot be read.
    """
    file = path / WEIGHTS_INDEX
    if not file.is_file():
        return
    try:
        files = {*json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()}
        outside = sorted(one for one in files if PurePath(one).name != one)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{name}: {file}: cannot be read ({first_line(error)})") from error
    if outside:
        raise CheckpointError(
            f"{name}: {file} names weights elsewhere ({outside[0]!r}); put them beside it, and "
            "name them by their file names"
        )


def lasting_name(name_or_dir: str | Path) -> str:
    """`name_or_dir` for use in another file: a directory's path is made absolute."""
    path = Path(name_or_dir).expanduser()
    return str(path.absolute()) if path.is_dir() and str(name_or_dir) != "tiny" else str(path)
