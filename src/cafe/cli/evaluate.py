"""`cafe evaluate`: a model and a task become numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cafe.cli.arguments import Model


class Task(StrEnum):
    """What can be measured."""

    retrieval = "retrieval"
    caption = "caption"
    presence = "presence"
    gap = "gap"


def command(
    model: Model,
    task: Annotated[Task, typer.Option(help="What to measure.")],
    data: Annotated[
        Path | None, typer.Option(help="Data folder; default: held-out generated scenes.")
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write the result here.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many records only.")
    ] = None,
) -> None:
    """Measure a model.

    The tasks are retrieval, caption, presence (does it see what is not there?), and gap (between
    the embeddings of pictures and of texts).
    """
    from cafe.evaluate.run import evaluate
    from cafe.model.vlm import CAFe

    result = evaluate(CAFe.from_pretrained(model), task.value, data, limit)
    rows = [(name, f"{v:.4f}" if isinstance(v, float) else str(v)) for name, v in _flat(result)]
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    if json_out is not None:
        _write_json(json_out, {"model": model, **result})


def _flat(scores: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _write_json(path: Path, result: Mapping[str, Any]) -> None:
    import json

    from cafe.cli.files import replacing, writing

    with replacing(path) as unfinished, writing(path):
        unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
