"""`cafe search`: ask an index in words, with a picture, or with both."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cafe.cli.found import Answer, Found
    from cafe.types import Image


def command(
    index_uri: Annotated[
        str, typer.Argument(metavar="DIR", help="An index that `cafe index` made.")
    ],
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT]", help="What to look for, in words.")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option("--image", help="A picture to look for, or to look for with TEXT."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="So many hits.")] = 10,
    rerank: Annotated[
        int | None,
        typer.Option(min=1, help="Let the model judge the so many best hits, one by one."),
    ] = None,
    where: Annotated[
        str | None, typer.Option(metavar="SQL", help='Only rows like "width > 640".')
    ] = None,
    answer: Annotated[
        bool, typer.Option("--answer", help="Answer TEXT from the hits, with numbered sources.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Default: the one that made the index.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Search by words, by a picture, or by both.

    A hit's score is the cosine. With --rerank, match is how probable the model finds that the
    picture shows what the text says, and posterior, which orders the hits, how probable it is by
    score and match together that this is the hit meant.
    """
    from cafe.index import Index

    picture = _checked(text, image, answer)
    index = Index.open(index_uri)
    if where is not None:
        index.count(where)  # before torch: bad SQL is told at once

    from cafe.cli.found import answered, reranked
    from cafe.cli.index_model import open_model

    vlm, _ = open_model(model or index.model.name, index)
    query: Any = {"text": text, "image": picture} if text and picture else text or picture
    hits = index.search(vlm.encode(query), max(top, rerank or 0), where)
    found = reranked(vlm, index.origin, text or picture, hits, rerank)[:top]
    said = answered(vlm, text, found) if answer and text and found else None
    if as_json:
        print(json.dumps(_as_json(found, said), ensure_ascii=False, indent=2, default=str))
    else:
        _show(found, said)


def _checked(text: str | None, image: Path | None, answer: bool) -> Image | None:
    """The picture, opened: a bad one is told before anything heavy is loaded."""
    from cafe.errors import DataError
    from cafe.media import open_image
    from cafe.types import Image

    if not (text and text.strip()) and image is None:
        raise DataError("nothing to search for: give TEXT, --image, or both")
    if answer and not text:
        raise DataError("--answer needs a question: give TEXT beside --image")
    return None if image is None else Image(open_image(Image(image)))


def _as_json(found: list[Found], said: Answer | None) -> dict[str, Any]:
    hits = [
        {
            "id": one.hit.id,
            "score": one.hit.score,
            **({} if one.match is None else {"match": one.match, "posterior": one.posterior}),
            "file": one.file,
            **one.hit.metadata,
        }
        for one in found
    ]
    if said is None:
        return {"hits": hits}
    sources = [
        {"number": n, "id": found[n - 1].hit.id, "file": found[n - 1].file} for n in said.sources
    ]
    answer = {"text": said.text, "sources": sources, "note": said.note}
    return {"hits": hits, "answer": answer}


def _show(found: list[Found], said: Answer | None) -> None:
    if not found:
        print("no hits")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    judged = any(one.match is not None for one in found)
    table = Table(box=None, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("score", justify="right")
    for name in ("match", "posterior") if judged else ():
        table.add_column(name, justify="right")
    table.add_column("found", overflow="fold")
    told = [str(one.hit.metadata.get("text") or "").replace("\n", " / ") for one in found]
    if any(told):
        table.add_column("text", overflow="ellipsis", no_wrap=True)
    for number, one in enumerate(found, 1):
        numbers = (one.match, one.posterior) if judged else ()
        judgement = ["" if value is None else f"{value:.3f}" for value in numbers]
        about = [Text(told[number - 1])] if any(told) else []
        # `Text`, because square brackets in a name are no markup.
        cells = (f"{one.hit.score:.3f}", *judgement, Text(one.file or one.hit.id), *about)
        table.add_row(str(number), *cells)
    # A pipe has no width: nothing is cut there.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)
    if said is not None:
        print(f"\n{said.text}\n\nsources:")
        for number in said.sources:
            one = found[number - 1]
            print(f"[{number}] {one.file or one.hit.id}")
        if said.note:
            print(f"({said.note})")
