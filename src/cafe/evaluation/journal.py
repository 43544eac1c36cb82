"""Answers of an unfinished run, one JSON line each, so that the next run resumes.

    ["0f3a…", "A red mug on a table."]

A line is written and flushed as soon as the answer is known, so after a failure only the missing
answers are computed. A truncated last line is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

from cafe.errors import DataError


class Journal:
    """Key -> answer, in memory and, if there is a folder, in its files.

    folder   None: in memory only
    writer   each process appends to a file of its own, and reads the files of all
    loaded   number of answers that were read from files
    """

    def __init__(self, folder: Path | None = None, writer: int = 0) -> None:
        self._known: dict[str, Any] = {}
        self._folder = folder
        self._path = None if folder is None else folder / f"{writer}.jsonl"
        self._file: IO[str] | None = None
        self.loaded = self._load()

    def __contains__(self, key: Hashable) -> bool:
        return _digest(key) in self._known

    def __getitem__(self, key: Hashable) -> Any:
        return self._known[_digest(key)]

    def put(self, key: Hashable, answer: Any) -> None:
        """Store `answer` (anything JSON-serialisable).

        Raises:
            DataError: The file cannot be written.
        """
        digest = _digest(key)
        self._known[digest] = answer
        if self._path is None:
            return
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8")
                if self._path.stat().st_size:
                    self._file.write("\n")  # ends a truncated line
            self._file.write(json.dumps([digest, answer]) + "\n")
            self._file.flush()
        except OSError as error:
            raise DataError(f"{self._path}: cannot be written ({error.strerror})") from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _load(self) -> int:
        """Read all files; returns the number of answers in them."""
        if self._folder is not None and self._folder.is_dir():
            for path in sorted(self._folder.glob("*.jsonl")):
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                    try:
                        digest, answer = json.loads(line)
                    except (ValueError, TypeError):
                        continue
                    self._known[digest] = answer
        return len(self._known)


def _digest(key: Hashable) -> str:
    return blake2b(repr(key).encode(), digest_size=12).hexdigest()
