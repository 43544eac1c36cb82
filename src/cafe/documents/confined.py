"""A process with limits, which reads PDFs or becomes another program.

A PDF is a program in disguise: a few kilobytes can ask for gigabytes of memory, for hours of
drawing, or crash the library that reads them. So that happens here and not in the process that
holds the model:

    python confined.py BYTES                           answers requests about PDFs, until stdin ends
    python confined.py BYTES SECONDS PROGRAM ARGUMENT… becomes PROGRAM, under the same limits

A request is a line of JSON on stdin, {"path", "page", "pixels", "seconds"}; without a page it asks
for the number of pages, with `"text": true` for the text of one. An answer on stdout is a line of
JSON, {"error"} or {"pages"} or {"text"} or {"width", "height", "bytes"}, the last followed by the
RGB pixels.

PDFium is used without its form module and pypdfium2 builds it without JavaScript: no script, action
or embedded file of a document is run, and no link is followed. The file imports nothing of cafe and
is started by its path: a fresh process is ready in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_SIDE = 14_400
"""Points: 200 inches, the largest page that the PDF format allows (ISO 32000-1, annex C)."""

MAX_SCALE = 200 / 72
"""200 dots per inch: a small page is not enlarged beyond what print resolves."""

MAX_CHARACTERS = 50_000
"""Of a page's text: a dense page of a newspaper has 20,000."""

_HYPHEN = re.compile(r"[\ufffe\x02](\r?\n)?")
"""What PDFium writes for the hyphen of a word that goes on in the next line."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class _Refused(Exception):
    """A document or page that is not read; the message is shown to the user."""


def limit_memory(size: int) -> None:
    """Allow this process `size` bytes of address space, where the system can limit it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_time(seconds: int) -> None:
    """End this process once it has computed for `seconds` more.

    The process that asks has a clock of its own; this one also works when that process is gone.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        most = math.ceil(used.ru_utime + used.ru_stime) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


def forbid_writing() -> None:
    """Writing to any file ends in an error; pipes are no files."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


class _Reader:
    """PDFium, with the last document held open: its pages are asked for one after another."""

    def __init__(self) -> None:
        import PIL.Image  # noqa: F401  (what is imported before the first request costs it nothing)
        import pypdfium2

        self._pdfium = pypdfium2
        self._key: tuple[str, int, int] | None = None
        self._document: Any = None

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """The answer's line, and the bytes that follow it."""
        try:
            document = self._open(request["path"])
            if "page" not in request:
                return {"pages": len(document)}, b""
            page = self._page(document, request["page"])
            try:
                if request.get("text"):
                    return {"text": _text(page)}, b""
                return _rendered(page, request["pixels"])
            finally:
                page.close()
        except _Refused as error:
            return {"error": str(error)}, b""
        except MemoryError:
            return {"error": "needs more memory than a page may take"}, b""
        except self._pdfium.PdfiumError as error:
            return {"error": f"cannot be read ({_first_line(error)})"}, b""

    def _open(self, path: str) -> Any:
        try:
            state = Path(path).stat()
        except OSError as error:
            raise _Refused(f"cannot be read ({error.strerror})") from error
        key = (path, state.st_size, state.st_mtime_ns)
        if key != self._key:
            if self._document is not None:
                self._document.close()
            self._key = self._document = None
            self._document = self._opened(path)
            self._key = key
        return self._document

    def _opened(self, path: str) -> Any:
        raw = self._pdfium.raw
        try:
            return self._pdfium.PdfDocument(path)
        except self._pdfium.PdfiumError as error:
            if error.err_code in (raw.FPDF_ERR_PASSWORD, raw.FPDF_ERR_SECURITY):
                raise _Refused("is encrypted; save it without its password") from error
            # PDFium calls a document without pages broken, too.
            why = f"is not a PDF that can be read, or has no pages ({_first_line(error)})"
            raise _Refused(why) from error

    def _page(self, document: Any, number: int) -> Any:
        if not 1 <= number <= len(document):
            raise _Refused(f"has no page {number:,}, only {len(document):,}")
        page = document[number - 1]
        width, height = page.get_size()
        if not (0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE):
            page.close()
            raise _Refused(
                f"is {width:,.0f} x {height:,.0f} points; sides of 1 to {LARGEST_SIDE:,} are read"
            )
        return page


def _rendered(page: Any, pixels: int) -> tuple[dict[str, Any], bytes]:
    """The page as RGB of at most `pixels` pixels: it is drawn at that size, and never larger."""
    width, height = page.get_size()
    scale = min(math.sqrt(pixels / (width * height)), MAX_SCALE)
    # PDFium rounds both sides up.
    while math.ceil(width * scale) * math.ceil(height * scale) > pixels and scale > 1e-6:
        scale *= 0.999
    image = page.render(scale=scale, may_draw_forms=False).to_pil().convert("RGB")
    content = image.tobytes()
    return {"width": image.width, "height": image.height, "bytes": len(content)}, content


def _text(page: Any) -> str:
    """What the page stores as text, in the order of the file; empty for a scan."""
    found = page.get_textpage()
    try:
        if found.count_chars() > MAX_CHARACTERS:
            text = found.get_text_range(0, MAX_CHARACTERS)
        else:
            text = found.get_text_bounded()
    finally:
        found.close()
    text = _HYPHEN.sub("", text[:MAX_CHARACTERS]).replace("\r\n", "\n")
    text = _CONTROL.sub(" ", text)
    return text.encode("utf-8", "ignore").decode().strip()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    reader = _Reader()
    for line in requests:
        request = json.loads(line)
        limit_time(request["seconds"])
        head, content = reader.answer(request)
        answers.write(json.dumps(head).encode() + b"\n" + content)
        answers.flush()


def _main(arguments: list[str]) -> None:
    limit_memory(int(arguments[0]))
    if len(arguments) > 1:
        limit_time(int(arguments[1]))
        os.execvp(arguments[2], arguments[2:])
    forbid_writing()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not stand among the answers
    _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    _main(sys.argv[1:])
