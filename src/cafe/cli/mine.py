"""`cafe mine`: a model finds hard negatives for the pairs of a training file."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cafe.cli.arguments import Model

if TYPE_CHECKING:
    import numpy as np

    from cafe.data.negatives import Pairs
    from cafe.metrics.mining import HardNegatives
    from cafe.model.vlm import CAFe
    from cafe.types import Conversation, Example

BLOCK = 1024
"""Inputs between two updates of the progress bar, and of which one broken one is looked for."""


def command(
    model: Model,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="What a recipe's data.path may name: pairs.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Where to write.")],
    window: Annotated[
        str,
        typer.Option(
            "--range", metavar="A-B", help="Skip the A best candidates, end with the B-th."
        ),
    ] = "10-50",
    margin: Annotated[
        float | None,
        typer.Option(min=0, help="Negatives score at least so much below the positive."),
    ] = None,
    relative_margin: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Negatives score at most this share of the positive; 1: all below."
        ),
    ] = 0.95,
    count: Annotated[int, typer.Option(min=1, help="Negatives per query, at most.")] = 7,
    image_root: Annotated[
        Path | None,
        typer.Option(help="Where picture paths start, in DATA and FILE; default: DATA's folder."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs embedded at once.")] = 32,
) -> None:
    """Find hard negatives for a training file.

    Writes ms-swift's embedding JSONL. A pair's own target, targets with the same id, and other
    targets of the same query are never its negatives.
    """
    ranks = _ranks(window, count)
    root = _folder(data) if image_root is None else image_root
    pairs = _read(data, image_root)  # before torch: a wrong path is told at once

    from cafe.cli.files import replacing, writing
    from cafe.metrics.mining import hard_negatives

    with replacing(out) as unfinished:
        pairs, queries, targets = _embedded(model, pairs, batch_size)
        found = hard_negatives(
            queries[pairs.query_of],
            targets,
            pairs.relevant,
            window=ranks,
            count=count,
            margin=margin,
            share=relative_margin or None,
        )
        with writing(out):
            unfinished.write_text("".join(_lines(pairs, found, root)), encoding="utf-8")
    print(_report(found, count))
    print(f"{len(pairs.examples)} records in {out}; picture paths start at {root}")


def _folder(data: str) -> Path:
    """Where picture paths start when nobody says: the folder, or the file's own."""
    return Path(data) if Path(data).is_dir() else Path(data).parent


def _ranks(window: str, count: int) -> tuple[int, int]:
    from cafe.errors import DataError

    match = re.fullmatch(r"(\d+)-(\d+)", window.strip())
    if match is None or int(match[2]) - int(match[1]) < count:
        raise DataError(
            f"--range {window}: expected two ranks with room for {count} negatives between them, "
            "e.g. 10-50"
        )
    return int(match[1]), int(match[2])


def _read(data: str, image_root: Path | None) -> Pairs:
    from cafe.data.negatives import collect_pairs
    from cafe.data.read import read_examples
    from cafe.data.records import Reading

    records = read_examples(data, Reading(language_loss=False, image_root=image_root))
    for rejected in records.rejected:
        print(f"skipped {rejected}", file=sys.stderr)
    return collect_pairs(records.examples)


def _embedded(model: str, pairs: Pairs, batch_size: int) -> tuple[Pairs, np.ndarray, np.ndarray]:
    """Unit embeddings of queries and targets; pairs with an input that fails are left out."""
    from cafe.cli.progress import progress_bar
    from cafe.data.negatives import collect_pairs
    from cafe.model.vlm import CAFe

    vlm = CAFe.from_pretrained(model)
    sides = (
        (pairs.queries, _prompts(pairs.queries, pairs.query_of, pairs.examples)),
        (pairs.targets, _prompts(pairs.targets, [r[0] for r in pairs.relevant], pairs.examples)),
    )
    with progress_bar("embed", len(pairs.queries) + len(pairs.targets)) as done:
        total = 0

        def advance(more: int) -> None:
            nonlocal total
            total += more
            done(total)

        (queries, bad_queries), (targets, bad_targets) = (
            _embed(vlm, conversations, prompts, batch_size, advance)
            for conversations, prompts in sides
        )
    if not bad_queries and not bad_targets:
        return pairs, queries, targets
    good = []
    for example, query, relevant in zip(
        pairs.examples, pairs.query_of, pairs.relevant, strict=True
    ):
        reason = bad_queries.get(query) or bad_targets.get(relevant[0])
        if reason is None:
            good.append(example)
        else:
            print(f"skipped example {example.id!r}: {reason}", file=sys.stderr)
    kept = collect_pairs(good)
    rows, columns = (
        [{id(c): i for i, c in enumerate(all_of)}[id(c)] for c in some]
        for all_of, some in ((pairs.queries, kept.queries), (pairs.targets, kept.targets))
    )
    return kept, queries[rows], targets[columns]


def _prompts(
    conversations: Sequence[Conversation], numbers: Sequence[int], examples: Sequence[Example]
) -> list[str]:
    """The embedding prompt of each conversation: that of the first pair that has it."""
    prompts = [""] * len(conversations)
    for number, example in zip(numbers, examples, strict=True):
        prompts[number] = prompts[number] or example.embedding_prompt
    return prompts


def _embed(
    vlm: CAFe,
    conversations: Sequence[Conversation],
    prompts: Sequence[str],
    batch_size: int,
    advance: Callable[[int], None],
) -> tuple[np.ndarray, dict[int, str]]:
    """Unit embeddings float32 [n, d]; what cannot be embedded is zero, with its reason."""
    import numpy as np

    embeddings = np.zeros((len(conversations), vlm.embedding_dimension), dtype=np.float32)
    failures: dict[int, str] = {}
    for prompt in sorted(set(prompts)):
        chosen = [i for i, own in enumerate(prompts) if own == prompt]
        for start in range(0, len(chosen), BLOCK):
            block = chosen[start : start + BLOCK]
            for part, rows, reason in _attempts(vlm, conversations, block, prompt, batch_size):
                if rows is None:
                    failures[part[0]] = reason
                else:
                    embeddings[part] = rows
            advance(len(block))
    return embeddings, failures


def _attempts(
    vlm: CAFe,
    conversations: Sequence[Conversation],
    block: list[int],
    prompt: str,
    batch_size: int,
) -> Iterator[tuple[list[int], np.ndarray | None, str]]:
    """Embed a block; when one of it is broken, halve it until that one is alone."""
    from cafe.errors import DataError

    try:
        rows = vlm.encode(
            [conversations[i] for i in block], batch_size=batch_size, prompt_name=prompt
        )
        yield block, rows, ""
    except DataError as error:
        if len(block) == 1:
            yield block, None, str(error)
            return
        middle = len(block) // 2
        for half in (block[:middle], block[middle:]):
            yield from _attempts(vlm, conversations, half, prompt, batch_size)


def _lines(pairs: Pairs, found: HardNegatives, root: Path) -> Iterator[str]:
    import json

    from cafe.data.negatives import swift_record

    for example, indices in zip(pairs.examples, found.indices, strict=True):
        negatives = [pairs.targets[i] for i in indices if i >= 0]
        yield json.dumps(swift_record(example, negatives, root), ensure_ascii=False) + "\n"


def _report(found: HardNegatives, count: int) -> str:
    """How many queries got how many negatives, and how hard they are."""
    import numpy as np

    counts = found.counts
    full, none = int((counts == count).sum()), int((counts == 0).sum())
    lines = [
        f"{len(counts)} queries: {full} with {count} negatives, "
        f"{len(counts) - full - none} with fewer, {none} without",
        f"{found.removed} candidates scored too near the positive",
    ]
    if none < len(counts):
        own, hard = float(found.own_scores.mean()), float(np.nanmean(found.scores))
        lines.append(f"mean score of positives {own:.3f}, of negatives {hard:.3f}")
    return "\n".join(lines)
