"""Files and directories that appear complete or not at all, and names that stay inside a folder.

Everything is written to a temporary sibling that is then renamed: readers see the old content or
the new, and a killed process leaves at most an unused sibling. A rename alone does not survive a
power failure; for that the content must have been synced to disk:

    replacing, write_json               not synced: embeddings, results, indices, logs. One command
                                        recreates them, and there may be thousands of them
    whole_directory                     synced: checkpoints and models of a run. They took hours,
                                        and older checkpoints are deleted once a new one exists
    whole_directory(…, sync=False)      scenes and converted models, which one command recreates

What is read lies in a folder that somebody named: `files_in` lists it, `inside` finds a name of
its data there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from cafe.errors import DataError

UNFINISHED = ".tmp-"
"""Prefix of the names of directories that are not complete yet."""

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.unfinished")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file next to `path` that replaces it when the block ends without an error.

    Several processes and threads may write the same path: the last one's file stays.

    Raises:
        DataError: before the block runs, when no file can be written there.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file")
    unfinished = path.with_name(f".{path.name}.{os.urandom(4).hex()}.unfinished")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
    try:
        yield unfinished
        with writing(path):
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a full disk or a missing permission into a DataError that names `path`.

    A temporary file of `replacing` is named as the file that it would have become.
    """
    try:
        yield
    except OSError as error:
        become = _TEMPORARY.fullmatch(path.name)
        shown = path.with_name(become[1]) if become else path
        raise DataError(f"{shown}: cannot be written ({error.strerror or error})") from error


def write_json(path: Path, record: Mapping[str, Any], indent: int | None = 1) -> None:
    """Write `record` as JSON. Raises DataError when it cannot be written."""
    with replacing(path) as unfinished, writing(path):
        unfinished.write_text(json.dumps(record, indent=indent) + "\n", encoding="utf-8")


def unfinished_name(target: Path) -> Path:
    """The directory that `whole_directory` fills for `target`; other processes may fill it too."""
    return target.with_name(UNFINISHED + target.name)


@contextmanager
def whole_directory(target: Path, *, sync: bool = True) -> Iterator[Path]:
    """A temporary sibling to fill; it becomes `target` if the block succeeds, else it goes.

    An existing directory at `target` is replaced. Only one process at a time may do this.

    Args:
        target: The directory to write.
        sync: Sync the content to disk before `target` appears.
    """
    unfinished = unfinished_name(target)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if sync:
            for path in [*unfinished.rglob("*"), unfinished]:
                _sync(path)
        replaced = target.with_name(f"{UNFINISHED}{target.name}-replaced")
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        unfinished.rename(target)
        if sync:
            _sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    """Have the kernel write a file, or a directory's entries, to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inside(root: Path, name: str, walked: dict[Path, Path] | None = None) -> Path | None:
    """The path of `name` relative to `root`; None if it leaves `root`.

    The links in `root` are those of the person who named the folder, and are followed wherever they
    lead: the images of a hub cache are links to files beside it. Names come from data, so one with
    `..`, or an absolute one, is judged by where it leads. Nothing needs to exist there.

    Args:
        root: The folder that must not be left. It may be a link.
        name: A path relative to it, from an untrusted source.
        walked: Cache of folders and what they resolve to; share one for all names of a root.

    Returns:
        The path with all links resolved where that lies in `root`, so one file has one path; else
        the path below `root`.

    Raises:
        ValueError: `name` is not a path: too long, with a null byte, or a loop of links.
    """
    if "\0" in name:
        raise ValueError("it contains a null byte")
    walked = {} if walked is None else walked
    path = root / name
    try:
        for folder in (root, path.parent):
            if folder not in walked:
                walked[folder] = folder.resolve()
        resolved = walked[path.parent] / path.name
        if path.name == ".." or resolved.is_symlink():
            resolved = resolved.resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(getattr(error, "strerror", None) or str(error)) from error
    if resolved.is_relative_to(walked[root]):
        return resolved
    for folder in (root, walked[root]):
        if path.is_relative_to(folder) and ".." not in (below := path.relative_to(folder)).parts:
            return walked[root] / below
    return None


def is_system_file(path: PurePath) -> bool:
    """Whether macOS added a file of this name to a copy or an archive.

    `._photo.jpg` holds the attributes of photo.jpg, and is no image.
    """
    name = path.name
    return name.startswith("._") or name == ".DS_Store" or "__MACOSX" in path.parts


def files_in(folder: Path) -> list[Path]:
    """The files of a folder at any depth, relative to it, in order; without those of macOS.

    Folders that are links are followed where they lead out of `folder`: what is inside is listed in
    its own place. Each is listed once, and none that holds `folder` is. Folders that may not be
    read are left out.
    """
    root = folder.resolve()
    seen: set[Path] = set()
    files: list[Path] = []
    coming = [folder]
    while coming:
        for path in _entries(coming.pop()):
            if path.is_dir():
                real = path.resolve()
                nested = real.is_relative_to(root) or root.is_relative_to(real)
                if real not in seen and not (nested and path.is_symlink()):
                    seen.add(real)
                    coming.append(path)
            elif path.is_file() and not is_system_file(path.relative_to(folder)):
                files.append(path.relative_to(folder))
    return sorted(files)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except PermissionError:
        return []


def as_on_disk(path: Path) -> Path:
    """`path`, or the file whose name differs only in how its Unicode is composed.

    macOS decomposed the names of files for long, so "é" is one character in a table and two in the
    name of the file that it means.
    """
    if path.exists() or str(path).isascii():
        return path
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        spellings = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        found = next((p for name in spellings if (p := found / name).exists()), found / part)
    return found if found.exists() else path


_LFS_BEGIN = b"version https://git-lfs.github.com/spec/"
_LFS_BYTES = 1024  # no pointer is longer


def check_is_content(path: Path) -> None:
    """Raises DataError when the file is a Git LFS pointer: the content was never downloaded."""
    try:
        if path.stat().st_size > _LFS_BYTES:
            return
        begin = path.read_bytes()
    except OSError:  # who reads the file says what is wrong
        return
    if is_lfs_pointer(begin):
        raise DataError(f"{path}: {LFS_POINTER}")


def is_lfs_pointer(content: bytes) -> bool:
    """Whether a file's content is a Git LFS pointer."""
    return content.startswith(_LFS_BEGIN)


LFS_POINTER = "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
"""What is wrong with such a file, and the fix."""
