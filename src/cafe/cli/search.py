"""`cafe search`: ask an index in words, with an image, or with both."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cafe.cli.arguments import CaptionOption, ThinkOption
from cafe.errors import printable, shortened

if TYPE_CHECKING:
    from cafe.retrieval.search import RankedHit, SearchAnswer
    from cafe.types import Image

_PAGE_CHARACTERS = 200
"""Of a page's text in the table; --json gives all of it."""

_JUDGED = ("match", "log_likelihood", "posterior")


class Judgement(StrEnum):
    """What `--rerank` goes by."""

    question = "question"
    likelihood = "likelihood"


RerankByOption = Annotated[
    Judgement,
    typer.Option(help="The yes/no question, or how likely the text is as the image's caption."),
]


def command(
    index_uri: Annotated[
        str, typer.Argument(metavar="DIR", help="An index that `cafe index` made.")
    ],
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT]", help="What to look for, in words.")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option("--image", help="An image to look for, or to look for with TEXT."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of hits.")] = 10,
    rerank: Annotated[
        int | None,
        typer.Option(min=1, help="Rerank the top N hits with the model."),
    ] = None,
    rerank_by: RerankByOption = Judgement.question,
    where: Annotated[
        str | None, typer.Option(metavar="SQL", help='Only rows like "width > 640".')
    ] = None,
    hybrid: Annotated[
        bool,
        typer.Option(
            "--hybrid", help="Also order by the words of TEXT in texts, captions and thoughts."
        ),
    ] = False,
    caption: CaptionOption = False,
    think: ThinkOption = None,
    answer: Annotated[
        bool, typer.Option("--answer", help="Answer TEXT from the hits, with numbered sources.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Default: the one that made the index.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Search by words, by an image, or by both.

    A hit's score is the cosine (in an index made with --multi-vector: MaxSim of the token vectors),
    also with --hybrid, which fuses the ranks of two orders. With --rerank, match is how probable
    the model finds that the image shows what the text says (by likelihood: log P of the text as its
    caption), and posterior, which orders the hits, how probable it is by score and match together
    that this is the hit meant.
    """
    from cafe.index import Index
    from cafe.retrieval.search import Searcher

    query_image = _checked(text, image, answer, hybrid)
    index = Index.open(index_uri)
    if hybrid:
        index.check_words()  # before torch, as the next
    if where is not None:
        index.count(where)  # bad SQL is reported immediately
    searcher = Searcher.open(index, model)
    query: Any = (
        {"text": text, "image": query_image} if text and query_image else text or query_image
    )
    hits = searcher.search(
        query, max(top, rerank or 0), where, caption=caption, think=think, hybrid=hybrid
    )
    if rerank is not None:
        hits = searcher.rerank(query, hits, rerank, by=rerank_by.value)
    hits = hits[:top]
    said = searcher.answer(text, hits) if answer and text and hits else None
    if as_json:
        print(json.dumps(_as_json(hits, said), ensure_ascii=False, indent=2, default=str))
    else:
        _show(hits, said)


def _checked(text: str | None, image: Path | None, answer: bool, hybrid: bool) -> Image | None:
    """The image, opened: a bad one is reported before anything heavy is loaded."""
    from cafe.errors import DataError
    from cafe.media import open_image
    from cafe.types import Image

    if not (text and text.strip()) and image is None:
        raise DataError("nothing to search for: give TEXT, --image, or both")
    if answer and not text:
        raise DataError("--answer needs a question: give TEXT with --image")
    if hybrid and not text:
        raise DataError("--hybrid needs words: give TEXT with --image")
    return None if image is None else Image(open_image(Image(image)))


def _as_json(hits: list[RankedHit], said: SearchAnswer | None) -> dict[str, Any]:
    records = [
        {
            "id": hit.id,
            "score": hit.score,
            **{name: value for name in _JUDGED if (value := getattr(hit, name)) is not None},
            "file": hit.file,
            "location": hit.location,
            **hit.hit.metadata,
        }
        for hit in hits
    ]
    if said is None:
        return {"hits": records}
    sources = [
        {
            "number": n,
            "id": (hit := hits[n - 1]).id,
            "file": hit.file,
            "page": hit.page,
            "location": hit.location,
        }
        for n in said.sources
    ]
    answer = {"text": said.text, "sources": sources, "note": said.note}
    return {"hits": records, "answer": answer}


def _text(metadata: Mapping[str, Any]) -> str:
    """A hit's own text; without one, what a model wrote of its image, by which --hybrid orders."""
    text = str(metadata.get("text") or metadata.get("generated_caption") or "")
    return text if metadata.get("page") is None else shortened(text, _PAGE_CHARACTERS)


def _show(hits: list[RankedHit], said: SearchAnswer | None) -> None:
    if not hits:
        print("no hits")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    judged = [name for name in _JUDGED if any(getattr(hit, name) is not None for hit in hits)]
    table = Table(box=None, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("score", justify="right")
    for name in judged:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("found", overflow="fold")
    names = [printable(hit.location if hit.file else hit.id, sys.stdout) for hit in hits]
    texts = [printable(_text(hit.hit.metadata).replace("\n", " / "), sys.stdout) for hit in hits]
    if any(texts):
        table.add_column("text", overflow="ellipsis", no_wrap=True)
    for number, (hit, name, text) in enumerate(zip(hits, names, texts, strict=True), 1):
        values = [getattr(hit, name) for name in judged]
        judgement = ["" if value is None else f"{value:.3f}" for value in values]
        # `Text`, because square brackets in a name are not markup.
        cells = (f"{hit.score:.3f}", *judgement, Text(name))
        table.add_row(str(number), *cells, *([Text(text)] if any(texts) else []))
    # A pipe has no width: nothing is cut there.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)
    if said is not None:
        print(printable(f"\n{said.text}\n\nsources:", sys.stdout))
        for number in said.sources:
            print(f"[{number}] {names[number - 1]}")
        if said.note:
            print(f"({said.note})")
