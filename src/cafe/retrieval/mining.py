"""Hard negatives for the pairs of a training file, found by a model's own embeddings.

What a hard negative is, and which candidates are left out, is in `cafe.metrics.mining`. Here the
two sides of the pairs are embedded, each query and each target once, and the result is written in
ms-swift's embedding format (`cafe.data.negatives`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cafe.batching import encode_each
from cafe.data.negatives import Pairs, collect_pairs, swift_record
from cafe.data.quarantine import add_skipped, log_skipped
from cafe.data.read import read_examples
from cafe.data.records import ReadOptions
from cafe.files import replacing, writing
from cafe.metrics.mining import HardNegatives, check_limits, hard_negatives
from cafe.progress import progress_bar

if TYPE_CHECKING:
    from cafe.model.vlm import CAFe
    from cafe.types import Conversation, Example


BLOCK = 1024
"""Inputs between two updates of the progress bar; a broken input is looked for within one block."""


class EncodeSide(Protocol):
    """Embeds conversations: unit vectors, float32 [n, d]. A DataError refuses all of them."""

    def __call__(self, conversations: Sequence[Conversation], prompt_name: str) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class MiningReport:
    """What `mine_hard_negatives` found.

    examples    the pairs in the order of the data, each with its negatives, hardest first
    found       scores of the negatives and of the positives, one row for each example
    skipped     one line for each record and each example that was left out
    image_root  where image paths in the written file start
    """

    examples: list[Example]
    found: HardNegatives
    skipped: list[str]
    image_root: Path


def mine_hard_negatives(
    model: CAFe | str | Path,
    data: str | Path,
    *,
    out: str | Path | None = None,
    rank_range: tuple[int, int] = (10, 50),
    margin: float | None = None,
    max_share: float | None = 0.95,
    count: int = 7,
    image_root: str | Path | None = None,
    batch_size: int = 32,
    encode: EncodeSide | None = None,
    load: Callable[[str], CAFe] | None = None,
    on_skipped: Callable[[str], None] | None = None,
    show_progress_bar: bool = False,
) -> MiningReport:
    """Find hard negatives for the pairs of a training file.

    A pair's own target, targets with the same id, and other targets of the same query are never
    its negatives.

    Args:
        model: a loaded model, or what `CAFe.from_pretrained` takes.
        data: what a recipe's `data.path` may name; its records must be pairs.
        out: the JSONL file to write, in ms-swift's embedding format; None: write nothing.
        rank_range: (a, b): skip the a best candidates of a query, end with the b-th.
        margin: negatives score at least this much below the positive; None: no such limit.
        max_share: negatives score at most this share of the positive; None: no such limit. It is
            one minus sentence-transformers' `relative_margin`.
        count: maximum number of negatives per query.
        image_root: where image paths start, in `data` and in `out`; None: the folder of `data`.
        batch_size: inputs that are embedded together.
        encode: embeds the inputs in place of the model, which is then not loaded.
        load: loads the model by its name, in place of `CAFe.from_pretrained`.
        on_skipped: called with one line for each record or example that is left out; None: the
            line is logged as a warning.
        show_progress_bar: draw one, on stderr.

    Returns:
        The examples with their negatives, and all scores.

    Raises:
        DataError: the data cannot be read or has no pairs, `out` cannot be written, or an image
            has no path below `image_root`.
        CheckpointError: the model cannot be loaded.
        ValueError: limits that leave no room, as in `cafe.metrics.mining.hard_negatives`.

    Example:
        >>> report = mine_hard_negatives("tiny", "captions.json", rank_range=(0, 3), count=2)
        >>> [len(example.negatives) for example in report.examples]
        [1, 0, 2, 0]
        >>> report.examples[0].negatives[0][0].text
        'The picture shows a big kite at the top left.'
    """
    check_limits(rank_range, count, margin, max_share)
    root = _folder(data) if image_root is None else Path(image_root)
    skipped: list[str] = []
    skip = partial(add_skipped, skipped, on_skipped or log_skipped)
    pairs = read_pairs(data, None if image_root is None else root, skip)
    with nullcontext() if out is None else replacing(Path(out)) as unfinished:
        encode = encode or side_encoder(model, batch_size, load)
        pairs, queries, targets = embedded_pairs(encode, pairs, skip, show_progress_bar)
        limits: dict[str, Any] = {"window": rank_range, "margin": margin, "share": max_share}
        rows = queries[pairs.query_of]
        found = hard_negatives(rows, targets, pairs.relevant, count=count, **limits)
        examples = _with_negatives(pairs, found)
        if out is not None and unfinished is not None:
            write_lines(unfinished, _lines(examples, root), Path(out))
    return MiningReport(examples, found, skipped, root)


def read_pairs(data: str | Path, image_root: Path | None, skip: Callable[[str], None]) -> Pairs:
    """The pairs of `data`. No torch yet: a wrong path is reported immediately."""
    records = read_examples(data, ReadOptions(language_loss=False, image_root=image_root))
    for skipped in records.skipped:
        skip(str(skipped))
    return collect_pairs(records.examples)


def _folder(data: str | Path) -> Path:
    """Where image paths start by default: the folder, or that of the file."""
    path = Path(data)
    return path if path.is_dir() else path.parent


def side_encoder(
    model: CAFe | str | Path, batch_size: int, load: Callable[[str], CAFe] | None
) -> EncodeSide:
    """What embeds the sides of pairs; the model is loaded now."""
    if isinstance(model, str | Path):
        from cafe.model.vlm import CAFe

        model = (load or CAFe.from_pretrained)(str(model))
    vlm = model

    def encode(conversations: Sequence[Conversation], prompt_name: str) -> np.ndarray:
        return vlm.encode(conversations, batch_size=batch_size, prompt_name=prompt_name)

    return encode


def embedded_pairs(
    encode: EncodeSide, pairs: Pairs, skip: Callable[[str], None], show: bool
) -> tuple[Pairs, np.ndarray, np.ndarray]:
    """Unit embeddings of queries and targets; pairs with an input that fails are left out."""
    own = [relevant[0] for relevant in pairs.relevant]
    sides = (
        (pairs.queries, _prompts(pairs.queries, pairs.query_of, pairs.examples)),
        (pairs.targets, _prompts(pairs.targets, own, pairs.examples)),
    )
    with progress_bar("embed", len(pairs.queries) + len(pairs.targets), show=show) as bar:
        (queries, bad_queries), (targets, bad_targets) = (
            _embed(encode, conversations, prompts, bar.more) for conversations, prompts in sides
        )
    if not bad_queries and not bad_targets:
        return pairs, queries, targets
    kept: list[int] = []
    for number, example in enumerate(pairs.examples):
        reason = bad_queries.get(pairs.query_of[number]) or bad_targets.get(own[number])
        if reason is None:
            kept.append(number)
        else:
            skip(f"example {example.id!r}: {reason}")
    left = collect_pairs([pairs.examples[number] for number in kept])
    rows, columns = [0] * len(left.queries), [0] * len(left.targets)
    for now, before in enumerate(kept):
        rows[left.query_of[now]] = pairs.query_of[before]
        columns[left.relevant[now][0]] = own[before]
    return left, queries[rows], targets[columns]


def _prompts(
    conversations: Sequence[Conversation], numbers: Sequence[int], examples: Sequence[Example]
) -> list[str]:
    """The embedding prompt of each conversation: that of the first pair that has it."""
    prompts = [""] * len(conversations)
    for number, example in zip(numbers, examples, strict=True):
        prompts[number] = prompts[number] or example.embedding_prompt
    return prompts


def _embed(
    encode: EncodeSide,
    conversations: Sequence[Conversation],
    prompts: Sequence[str],
    advance: Callable[[int], None],
) -> tuple[np.ndarray, dict[int, str]]:
    """Unit embeddings float32 [n, d]; what cannot be embedded is zero, and has its reason."""
    embeddings = np.zeros((len(conversations), 0), dtype=np.float32)
    failures: dict[int, str] = {}
    for prompt in sorted(set(prompts)):
        chosen = [i for i, own in enumerate(prompts) if own == prompt]

        def one_prompt(values: Sequence[Conversation], name: str = prompt) -> np.ndarray:
            return encode(values, prompt_name=name)

        for start in range(0, len(chosen), BLOCK):
            block = chosen[start : start + BLOCK]
            found, failed = encode_each(one_prompt, [conversations[i] for i in block])
            for i, row in found.items():
                if not embeddings.shape[1]:
                    embeddings = np.zeros((len(conversations), len(row)), dtype=np.float32)
                embeddings[block[i]] = row
            failures |= {block[i]: str(error) for i, error in failed.items()}
            advance(len(block))
    return embeddings, failures


def _with_negatives(pairs: Pairs, found: HardNegatives) -> list[Example]:
    """The pairs with what was found, and the cosines of target and negatives as scores."""
    return [
        replace(
            example,
            negatives=tuple(pairs.targets[i] for i in indices if i >= 0),
            scores=(own, *scores[indices >= 0].round(6).tolist()),
        )
        for example, indices, scores, own in zip(
            pairs.examples,
            found.indices,
            found.scores.astype(float),
            found.own_scores.astype(float).round(6).tolist(),
            strict=True,
        )
    ]


def write_lines(unfinished: Path, lines: Iterable[str], out: Path) -> None:
    """Write what will become `out`. Raises DataError where the disk does not take it."""
    content = "".join(lines)
    with writing(out):
        unfinished.write_text(content, encoding="utf-8")


def _lines(examples: Sequence[Example], root: Path) -> Iterator[str]:
    for example in examples:
        record = swift_record(example, example.negatives, root)
        yield json.dumps(record, ensure_ascii=False) + "\n"
