"""Thoughts for training: a model describes the images of a data set (`cafe think`).

What is trained to embed after a thought should meet in training the thoughts that it will meet
later: a model's own, with their errors. The true captions would teach it to trust every word.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from cafe.batching import encode_each
from cafe.data.quarantine import add_skipped, log_skipped
from cafe.data.read import read_examples
from cafe.data.records import ReadOptions
from cafe.data.thoughts import (
    ThoughtKey,
    Thoughts,
    check_ids,
    read_thoughts,
    shows_images_only,
    thought_key,
    thought_line,
)
from cafe.errors import DataError
from cafe.files import writing
from cafe.progress import progress_bar
from cafe.ranks import Rank
from cafe.recipes import DataSource, load_source
from cafe.types import Conversation, Example

if TYPE_CHECKING:
    from cafe.model.vlm import CAFe

logger = logging.getLogger("cafe.retrieval")

BLOCK = 256
"""Examples whose thoughts are written together: what an interruption loses at most."""

_Write = Callable[[Sequence[Conversation]], Sequence[str | None]]


@dataclass(frozen=True, slots=True)
class ThoughtReport:
    """What `write_thoughts` did.

    written   number of examples whose thoughts were written now
    known     number of examples whose thoughts the file had already
    without   number of examples that have no side to think about, or about which the model says
              nothing; they embed as they are
    skipped   lines about records and examples that cannot be used
    """

    written: int
    known: int
    without: int
    skipped: list[str]


def write_thoughts(
    model: CAFe | str | Path,
    data: str | Path | DataSource,
    *,
    out: str | Path,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    on_skipped: Callable[[str], None] | None = None,
    show_progress_bar: bool = False,
    rank: Rank = Rank(),  # noqa: B008 - frozen
) -> ThoughtReport:
    """Let a model describe each side of a training pair that is an image without words.

    Args:
        model: a loaded model, or what `CAFe.from_pretrained` takes.
        data: what a recipe's `data.path` may name, or a data source with its keys; its records must
            be pairs, and get the ids that training sees.
        out: the JSONL file, for `data.thoughts` of a recipe. If it exists, what it lacks is added.
        max_new_tokens: longest thought.
        batch_size: images that are described together.
        on_skipped: called with one line for each record or example that is left out; None: the
            line is logged as a warning.
        show_progress_bar: draw one, on stderr.
        rank: this process among those that share the work (`cafe.ranks.process_group`).

    Raises:
        DataError: the data cannot be read or has no side to think about, or `out` cannot be
            written.
        CheckpointError: the model cannot be loaded.

    Example:
        >>> write_thoughts("tiny", "captions.json", out="thoughts.jsonl").written
        4
    """
    source = data if isinstance(data, DataSource) else load_source(str(data))
    skipped: list[str] = []
    skip = partial(add_skipped, skipped, on_skipped or log_skipped)
    pairs, left_out = _pairs(source, skip)
    named = str(model) if isinstance(model, str | Path) else None
    with ExitStack() as held:

        def begin(paths: Sequence[Path]) -> list[dict[ThoughtKey, Thoughts]]:
            held.enter_context(_only_writer(paths[0]))
            return [_known(paths[0])]

        known = rank.share([Path(out)], begin)[0]  # rank 0 does it; its errors are raised on all
        check_model(Path(out), known, named)
        missing = [example for example in pairs if thought_key(example) not in known]
        if not missing:
            return ThoughtReport(0, len(known), left_out, skipped)
        write = _writer(model, max_new_tokens, batch_size, rank)
        shown = show_progress_bar and rank.index == 0
        with progress_bar("think", len(missing), show=shown) as bar:
            found: list[Thoughts | str] = []
            for start in range(0, len(missing), BLOCK):
                block = missing[start : start + BLOCK]
                own = rank.share(block, partial(_thoughts, write, named))
                rank.share([own], partial(_append, Path(out), block))
                found += own
                bar.more(len(block))
    for example, thoughts in zip(missing, found, strict=True):
        if isinstance(thoughts, str):
            skip(f"example {example.id!r}: {thoughts}")
    silent = sum(isinstance(thoughts, Thoughts) and thoughts.empty for thoughts in found)
    failed = sum(isinstance(thoughts, str) for thoughts in found)
    return ThoughtReport(len(found) - silent - failed, len(known), left_out + silent, skipped)


@contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    """Allow one process at a time to write the file. Raises DataError where another one does."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.writer"))
    with writing(path):
        try:
            lock.acquire(blocking=False)
        except Timeout as error:  # which is an OSError, too
            raise DataError(f"{path}: another process is writing it; wait for it") from error
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def _pairs(source: DataSource, skip: Callable[[str], None]) -> tuple[list[Example], int]:
    """The pairs with a side to think about, and the number of other examples."""
    records = read_examples(source.path, ReadOptions.of(source))
    for record in records.skipped:
        skip(str(record))
    pairs = [
        example
        for example in records.examples
        if shows_images_only(example.query) or shows_images_only(example.target)
    ]
    if not pairs:
        raise DataError(
            f"{source.path}: none of its {len(records.examples)} examples has an image without "
            "words on a side of its pair, which is what a model thinks about"
        )
    check_ids(pairs, source.path)
    return pairs, len(records.examples) - len(pairs)


def check_model(path: Path, known: dict[ThoughtKey, Thoughts], model: str | None) -> None:
    """Raises DataError where another model wrote the thoughts that are there already."""
    other = next((t.model for t in known.values() if t.model not in (None, model)), None)
    if model is not None and other is not None:
        raise DataError(
            f"{path}: was written by {other}, not by {model}; name another file, or remove it"
        )


def _thoughts(write: _Write, model: str | None, block: Sequence[Example]) -> list[Thoughts | str]:
    """The thoughts of each example, or why it cannot be used."""
    sides = [
        (i, name, side)
        for i, example in enumerate(block)
        for name, side in (("query", example.query), ("target", example.target))
        if side is not None and shows_images_only(side)
    ]
    texts, failures = encode_each(write, [side for _, _, side in sides])
    result: list[Thoughts | str] = [Thoughts(model=model) for _ in block]
    for number, (i, name, _) in enumerate(sides):
        before = result[i]
        if number in failures:
            result[i] = str(failures[number])
        elif isinstance(before, Thoughts):
            result[i] = replace(before, **{name: texts[number]})
    return result


def _writer(model: CAFe | str | Path, max_new_tokens: int, batch_size: int, rank: Rank) -> _Write:
    if isinstance(model, str | Path):
        from cafe.model.vlm import CAFe

        model = CAFe.from_pretrained(model, device=rank.device)
    return partial(model.write_captions, max_new_tokens=max_new_tokens, batch_size=batch_size)


def _known(path: Path) -> dict[ThoughtKey, Thoughts]:
    """What the file has already; a last line that a killed run left half-written is cut off."""
    if not path.exists():
        return {}
    with writing(path), path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
    return read_thoughts(path)


def _append(
    path: Path, block: Sequence[Example], found: Sequence[Sequence[Thoughts | str]]
) -> list[int]:
    """The thoughts that were found go to the end of the file; returns their number."""
    text = "".join(
        thought_line(thought_key(example), thoughts)
        for example, thoughts in zip(block, found[0], strict=True)
        if isinstance(thoughts, Thoughts)
    )
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return [len(block)]
