"""Every error `cafe` raises on purpose. Each message names the location, the field and the fix.

CafeError
 ├── DataError         a file, record or image that cannot be used
 │    ├── ImageError        an image that cannot be decoded, or is out of bounds
 │    ├── AudioError        a recording that cannot be decoded, or is out of bounds
 │    └── NoLabelledTokens  an example with an answer none of whose tokens is labelled
 ├── RecipeError       a recipe key or value that is not valid
 ├── CheckpointError   a model directory or adapter that cannot be loaded
 ├── FamilyError       a model family that cafe has no facts for
 ├── TrainingError     a run that must stop (non-finite loss, full disk)
 └── WorkerError       an encoding process that died or cannot encode
"""

from __future__ import annotations

from typing import IO


class CafeError(Exception):
    """Base class. The command line prints it in one line, without a traceback.

    exit_code   of a command that ends with this error: 2, or 128 + a signal's number
    """

    exit_code: int = 2


class DataError(CafeError):
    pass


class ImageError(DataError):
    pass


class AudioError(DataError):
    pass


class NoLabelledTokens(DataError):
    pass


class RecipeError(CafeError):
    pass


class CheckpointError(CafeError):
    pass


class FamilyError(CafeError):
    pass


class TrainingError(CafeError):
    pass


class WorkerError(CafeError):
    pass


def shortened(text: str, limit: int = 120) -> str:
    """A text as a message holds it: of a long one the beginning, and how long it is."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text):,} characters)"


def quoted(value: object, limit: int = 300) -> str:
    """A value as a message quotes it, on one line however long it is.

    The limit leaves a path whole; an image in base64 where a path should be is cut.
    """
    if isinstance(value, str | bytes) and len(value) > limit:
        kept, unit = value[:limit], "characters" if isinstance(value, str) else "bytes"
        return f"{kept!r}… ({len(value):,} {unit})"
    return shortened(repr(value), limit)


_CONTROL = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
}


def printable(text: str, stream: IO[str]) -> str:
    """A text from files or models, for `stream`.

    On a terminal, control characters are escaped: a caption could otherwise move the cursor, change
    the window's title, or hide what was printed before it. A pipe gets every character.
    """
    return text.translate(_CONTROL) if stream.isatty() else text


def first_line(error: BaseException) -> str:
    """First line of another library's error; the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_unicode(text: str) -> None:
    """Raises DataError for half a surrogate pair, which JSON may contain and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise DataError(
            f"the text is not Unicode ({half} at character {error.start:,} is half a surrogate "
            "pair); remove it"
        ) from error
