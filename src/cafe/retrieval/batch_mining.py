"""Groups of alike pairs of a training file, found by a model's own embeddings (B3).

What a group is, and how it is found, is in `cafe.metrics.grouping`. The result is a file of ids,
which `data.*.groups` of a recipe names: pairs of a group then share a batch, where each is a hard
negative of the others (`cafe.data.groups`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cafe.data.groups import check_distinct_ids, group_line
from cafe.data.negatives import Pairs
from cafe.data.quarantine import add_skipped, log_skipped
from cafe.files import replacing
from cafe.metrics.grouping import groups_of_neighbours, hardest_in_group, mutual_neighbours
from cafe.metrics.mining import check_limits, hard_negatives
from cafe.retrieval.mining import (
    EncodeSide,
    embedded_pairs,
    read_pairs,
    side_encoder,
    write_lines,
)

if TYPE_CHECKING:
    from cafe.model.vlm import CAFe


@dataclass(frozen=True, slots=True)
class GroupingReport:
    """What `mine_batches` found.

    groups      ids of the pairs of each group
    neighbours  mean number of a pair's neighbours, and how many of them are in its group
    hardest     mean score of the best wrong target of a pair's group, and of as large random groups
    removed     targets in the windows that `margin` and `max_share` left out
    skipped     one line for each record and each example that was left out
    """

    groups: list[list[str]]
    neighbours: tuple[float, float]
    hardest: tuple[float, float]
    removed: int
    skipped: list[str]


def mine_batches(
    model: CAFe | str | Path,
    data: str | Path,
    *,
    size: int,
    out: str | Path | None = None,
    rank_range: tuple[int, int] = (10, 50),
    margin: float | None = None,
    max_share: float | None = 0.95,
    seed: int = 0,
    image_root: str | Path | None = None,
    batch_size: int = 32,
    encode: EncodeSide | None = None,
    load: Callable[[str], CAFe] | None = None,
    on_skipped: Callable[[str], None] | None = None,
    show_progress_bar: bool = False,
) -> GroupingReport:
    """Divide the pairs of a training file into groups in which targets are hard to tell apart.

    Two pairs are neighbours if each one's target is in the window of the other's query; a group
    has as many neighbours as can be. Pairs that are right for one another are never in one group.

    Args:
        model: the teacher: a loaded model, or what `CAFe.from_pretrained` takes.
        data: what a recipe's `data.path` may name; its records must be pairs.
        size: pairs of a group: the batch of the training (`batch.examples`), or a fraction of it.
        out: the file to write, one JSON list of ids on each line; None: write nothing.
        rank_range: (a, b): the window skips the a best candidates of a query, and ends with the
            b-th.
        margin: a target in the window scores at least this much below the positive; None: no limit.
        max_share: a target in the window scores at most this share of the positive; None: no limit.
        seed: decides between groupings that are equally good.
        image_root: where image paths start; None: the folder of `data`.
        batch_size: inputs that are embedded together.
        encode: embeds the inputs in place of the model, which is then not loaded.
        load: loads the model by its name, in place of `CAFe.from_pretrained`.
        on_skipped: called with one line for each record or example that is left out; None: the
            line is logged as a warning.
        show_progress_bar: draw one, on stderr.

    Raises:
        DataError: the data cannot be read or have no pairs, several pairs have the same id, or
            `out` cannot be written.
        CheckpointError: the model cannot be loaded.
        ValueError: a window without room, or a size below 2.

    Example:
        >>> report = mine_batches("tiny", "captions.json", size=4, rank_range=(0, 8))
        >>> [len(group) for group in report.groups]
        [4, 4, 4]
    """
    window = {"window": rank_range, "margin": margin, "share": max_share}
    check_limits(rank_range, max(1, rank_range[1] - rank_range[0]), margin, max_share)
    if size < 2:
        raise ValueError(f"size is {size}; a group has at least 2 pairs")
    skipped: list[str] = []
    skip = partial(add_skipped, skipped, on_skipped or log_skipped)
    pairs = read_pairs(data, None if image_root is None else Path(image_root), skip)
    check_distinct_ids(pairs.examples, str(data))
    with nullcontext() if out is None else replacing(Path(out)) as unfinished:
        encode = encode or side_encoder(model, batch_size, load)
        pairs, queries, targets = embedded_pairs(encode, pairs, skip, show_progress_bar)
        report = _grouped(pairs, queries[pairs.query_of], targets, size, seed, window)
        if out is not None and unfinished is not None:
            write_lines(unfinished, map(group_line, report.groups), Path(out))
    return replace(report, skipped=skipped)


def _grouped(
    pairs: Pairs,
    queries: np.ndarray,
    targets: np.ndarray,
    size: int,
    seed: int,
    window: dict[str, Any],
) -> GroupingReport:
    """The groups of the pairs, whose queries are [n, d]; `window` is as in `hard_negatives`."""
    low, high = window["window"]
    target_of = np.array([right[0] for right in pairs.relevant], dtype=np.int64)
    found = hard_negatives(queries, targets, pairs.relevant, count=high - low, **window)
    neighbours = mutual_neighbours(found.indices, target_of)
    groups = groups_of_neighbours(neighbours, target_of, pairs.relevant, size=size, seed=seed)
    inside = sum(len(set(neighbours[pair]) & set(group)) for group in groups for pair in group)
    hardest, by_chance = (
        float(np.nanmean(hardest_in_group(queries, targets, target_of, pairs.relevant, of)))
        for of in (groups, _by_chance(groups, seed))
    )
    return GroupingReport(
        [[pairs.examples[pair].id for pair in group] for group in groups],
        (sum(map(len, neighbours)) / len(queries), inside / len(queries)),
        (hardest, by_chance),
        found.removed,
        [],
    )


def _by_chance(groups: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
    """Random groups of the same sizes."""
    sizes = [len(group) for group in groups]
    order = np.random.default_rng(seed).permutation(sum(sizes))
    return [part.tolist() for part in np.split(order, np.cumsum(sizes)[:-1])]
