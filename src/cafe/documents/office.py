"""Word and PowerPoint files become PDFs, by LibreOffice, once for each content of a file.

LibreOffice runs with limits on time and memory (`cafe.documents.confined`) and a profile of its
own, in which macros are off, and links of documents to other files and addresses are not followed.
The PDFs stay in the user's cache: the pages of an index are drawn again when they are shown.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from cafe.documents import confined
from cafe.errors import DataError
from cafe.files import replacing

SUFFIXES = frozenset({".docx", ".pptx"})
PROGRAMS = ("soffice", "libreoffice")

CONVERSION_SECONDS = 120
CONVERSION_BYTES = 4 * 2**30

_PROFILE = """<?xml version="1.0" encoding="UTF-8"?>
<oor:items xmlns:oor="http://openoffice.org/2001/registry" \
xmlns:xs="http://www.w3.org/2001/XMLSchema" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
{items}
</oor:items>
"""
_ITEM = (
    '<item oor:path="/org.openoffice.Office.Common/{path}">'
    '<prop oor:name="{name}" oor:op="fuse"><value>{value}</value></prop></item>'
)
_SETTINGS = (
    ("Security/Scripting", "MacroSecurityLevel", "3"),
    ("Security/Scripting", "DisableMacrosExecution", "true"),
    ("Security/Scripting", "DisableActiveContent", "true"),
    ("Security/Scripting", "BlockUntrustedRefererLinks", "true"),
)
"""What a document may not do in LibreOffice: run anything, or load what it links to."""

_one_at_a_time = threading.Lock()
"""A conversion uses all that a small machine has, and the second thread would make the same PDF."""


def converted(path: Path, digest: str) -> Path:
    """The PDF of a Word or PowerPoint file whose bytes have this digest.

    Raises:
        DataError: without the file's name: LibreOffice is not there, failed, or took too long.
    """
    target = cache_folder() / f"{digest}.pdf"
    with _one_at_a_time:
        if target.is_file():
            return target
        program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
        if program is None:
            raise DataError(
                f"reading {path.suffix} files needs LibreOffice (soffice); install it, or save the "
                "file as PDF"
            )
        with tempfile.TemporaryDirectory(prefix="cafe-office-") as work:
            made = _convert(program, path, Path(work))
            with replacing(target) as unfinished:
                shutil.copyfile(made, unfinished)
    return target


def cache_folder() -> Path:
    """Where the PDFs are kept, by the digest of the file that they were made of."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cafe" / "documents"


def _convert(program: str, path: Path, work: Path) -> Path:
    """The PDF that LibreOffice makes in `work`. Raises DataError."""
    profile = work / "profile"
    (profile / "user").mkdir(parents=True)
    items = "\n".join(_ITEM.format(path=p, name=n, value=v) for p, n, v in _SETTINGS)
    settings = profile / "user" / "registrymodifications.xcu"
    settings.write_text(_PROFILE.format(items=items), encoding="utf-8")
    # Under a plain name: LibreOffice takes one that begins with "-" for an option.
    source = work / f"document{path.suffix.lower()}"
    shutil.copyfile(path, source)
    command = [
        *(sys.executable, "-P", confined.__file__),
        *(str(CONVERSION_BYTES), str(CONVERSION_SECONDS), program, "--headless", "--norestore"),
        *("--nolockcheck", f"-env:UserInstallation={profile.as_uri()}"),
        *("--convert-to", "pdf", "--outdir", str(work), str(source)),
    ]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # it starts processes of its own, which must end with it
    )
    try:
        code = process.wait(CONVERSION_SECONDS)
    except subprocess.TimeoutExpired:
        raise DataError(f"took LibreOffice more than {CONVERSION_SECONDS} s") from None
    finally:
        _end(process)
    made = source.with_suffix(".pdf")
    if code or not made.is_file():
        raise DataError("LibreOffice cannot make a PDF of it: it is damaged, or no such document")
    return made


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the program and all that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
