"""Examples that a run is measured on: split off its training data, or of a source of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cafe.data.dataset import ExampleSet
from cafe.data.read import read_examples
from cafe.data.records import ReadOptions
from cafe.errors import DataError
from cafe.model.rows.official import official_example
from cafe.recipes import Evaluate, Recipe
from cafe.types import Audio, Example, Part, StoredFile

_SPLIT_STREAM = 71
"""Keeps the draw of the split apart from other draws by the same seed."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a run is measured on.

    examples   whole examples, whatever the weights of the objective
    name       what messages call them
    overlap    number of them that are in the training data, too
    skipped    number of records that cannot be used
    """

    examples: tuple[Example, ...]
    name: str
    overlap: int = 0
    skipped: int = 0

    def warnings(self) -> Iterator[str]:
        """What to say before the first step."""
        if self.skipped:
            yield f"{self.name}: {self.skipped:,} records cannot be used and are not measured on"
        if self.overlap:
            yield (
                f"warning: {self.name}: {self.overlap:,} of {len(self.examples):,} examples show "
                "what the training data show, so their scores say less than they seem to; remove "
                "them from either"
            )


def split_off(
    sources: Sequence[Sequence[Example]], share: float | int, seed: int
) -> tuple[list[list[Example]], list[Example]]:
    """Take examples off the training data at random; all that show a common image stay together.

    Args:
        sources: The examples of each source.
        share: A fraction of all examples, or their number. A few more are taken where the last
            image has several.
        seed: Decides which.

    Returns:
        The rest of each source, and what was taken, both in their order.
    """
    every = [(number, example) for number, source in enumerate(sources) for example in source]
    wanted = share if isinstance(share, int) else round(share * len(every))
    group_of = _groups([example for _, example in every])
    sizes = np.bincount(group_of, minlength=1)
    order = np.random.default_rng([_SPLIT_STREAM, seed % 2**64]).permutation(len(sizes))
    before = np.cumsum(sizes[order]) - sizes[order]
    taken = np.zeros(len(sizes), dtype=bool)
    taken[order[before < wanted]] = True
    rest: list[list[Example]] = [[] for _ in sources]
    held: list[Example] = []
    for (number, example), group in zip(every, group_of, strict=True):
        (held if taken[group] else rest[number]).append(example)
    return rest, held


def held_out_examples(
    recipe: Recipe, taken: Sequence[Example], training: ExampleSet, index: Path | None
) -> HeldOut | None:
    """The examples that the recipe's evaluations measure on; None: they have tasks only.

    Args:
        recipe: Its `evaluate`, `objective` and `data` are used.
        taken: What `split_off` has taken.
        training: What is trained on.
        index: As in `load_data`.

    Raises:
        DataError: The source cannot be read, or there are fewer than two examples or pairs.
    """
    settings = recipe.evaluate
    if settings is None or (settings.data is None and settings.held_out is None):
        return None
    name, skipped, examples = f"evaluate.held_out: {settings.held_out}", 0, list(taken)
    if settings.data is not None:
        name = f"evaluate.data: {settings.data.path}"
        records = read_examples(settings.data.path, ReadOptions.of(settings.data), index=index)
        examples, skipped = records.examples, len(records.skipped)
    if recipe.objective.compat == "official":
        examples = [official_example(example) for example in examples]
    _check_enough(examples, name, settings)
    overlap = 0 if settings.data is None else count_overlap(examples, _all(training))
    return HeldOut(tuple(examples), name, overlap, skipped)


def _check_enough(examples: Sequence[Example], name: str, settings: Evaluate) -> None:
    pairs = sum(example.query is not None for example in examples)
    few = len(examples) if len(examples) < 2 else pairs
    if len(examples) < 2 or pairs == 1:
        kind = "examples" if len(examples) < 2 else "pairs of a query and a target"
        fix = "raise it" if settings.data is None else "name a larger source"
        raise DataError(f"{name}: {few} {kind}, and at least two are needed to rank them; {fix}")


def count_overlap(examples: Iterable[Example], training: Iterable[Example]) -> int:
    """Number of examples that show an image or a video of the training data (the same file), or
    that have the same texts and files of the same names.
    """
    images: set[object] = set()
    contents: set[object] = set()
    for example in training:
        images.update(_shown(example))
        contents.add(_content(example))
    return sum(
        _content(example) in contents or not images.isdisjoint(_shown(example))
        for example in examples
    )


def _all(training: ExampleSet) -> Iterator[Example]:
    return (example for source in training.sources for example in source.examples)


def _parts(example: Example) -> Iterator[Part]:
    for conversation in example.conversations:
        for message in conversation:
            yield from message.content


def _shown(example: Example) -> Iterator[object]:
    """What it shows, whatever the size that it is shown in."""
    for part in _parts(example):
        if isinstance(part, Audio):
            yield part.key if part.max_seconds is None else part.key[0]  # type: ignore[index]
        elif not isinstance(part, str):
            yield part.key if part.pixel_budget is None else part.key[0]  # type: ignore[index]


def _content(example: Example) -> object:
    """Equal for copies of a record: the texts, and the names of the files without their folders."""
    return frozenset(
        p if isinstance(p, str) else ("file", _name(p.source)) for p in _parts(example)
    )


def _name(source: Any) -> object:
    if isinstance(source, str | Path):
        return Path(source).name
    return source.name.rpartition("/")[2] if isinstance(source, StoredFile) else id(source)


def _groups(examples: Sequence[Example]) -> np.ndarray:
    """int64 [n]: equal for examples that are linked by common images, from 0 without gaps."""
    parent = list(range(len(examples)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    first: dict[object, int] = {}
    for number, example in enumerate(examples):
        for key in _shown(example):
            parent[root(number)] = root(first.setdefault(key, number))
    roots = [root(number) for number in range(len(examples))]
    return np.unique(np.array(roots, dtype=np.int64), return_inverse=True)[1]
