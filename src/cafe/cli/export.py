"""`cafe export`: a model, or an adapter merged into its base, as one directory for every tool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cafe.cli.arguments import Model

if TYPE_CHECKING:
    from cafe.model.export import Export
    from cafe.report.card import Agreement, Task


def command(
    model: Model,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="A new directory to write.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Add an adapter's updates to its base's weights.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Embed probes with transformers, sentence-transformers and cafe serve; compare.",
        ),
    ] = False,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            "--results",
            metavar="RESULT",
            help="Results of `cafe evaluate` for the model card: files or a folder; repeatable.",
        ),
    ] = None,
) -> None:
    """Write a model as one directory.

    transformers, sentence-transformers, vLLM and cafe read it. It is read back and must embed as
    MODEL does; an adapter stays an adapter, which only peft and cafe read, unless it is merged.
    README.md in it is a model card. Without --to, --verify checks MODEL where it is.
    """
    from cafe.errors import CheckpointError

    if to is None:
        if not verify or merge or results:
            raise CheckpointError("name a new directory: --to DIR (or --verify alone)")
        _verified_in_place(model)
        return
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CheckpointError(f"{to}: is there already; name a new directory")
    tasks = _tasks(results or (), model)

    from safetensors import SafetensorError

    from cafe.model.export import export
    from cafe.train.checkpoints import whole_directory

    try:
        with whole_directory(to.absolute()) as unfinished:
            done = export(model, unfinished, merge=merge)
            agreements = _verified(unfinished) if verify else []
            _write_card(unfinished, to.name, done, agreements, tasks)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{to}: cannot be written ({' '.join(str(error).split())})"
        ) from error
    dtype = str(done.dtype).removeprefix("torch.")
    print(
        f"{to}: {'merged, ' if merge else ''}{dtype}; embeddings of {done.probes} probes are "
        f"at most {done.distance:.1e} apart (tolerance {done.tolerance:.0e})"
    )


def _verified_in_place(model: str) -> None:
    from cafe.model.location import locate

    _verified(locate(model))


def _verified(directory: Path) -> list[Agreement]:
    """Every tool's agreement with cafe, told as it comes."""
    from cafe.cli.verify import verify
    from cafe.errors import CheckpointError
    from cafe.model.adapter import is_adapter

    if is_adapter(directory):
        raise CheckpointError("--verify: only peft and cafe read an adapter; merge it: --merge")
    agreements = []
    for agreement in verify(directory):
        print(
            f"{agreement.tool}: cosine {agreement.cosine:.7f} at least, "
            f"{agreement.distance:.1e} apart at most",
            flush=True,
        )
        agreements.append(agreement)
    return agreements


def _tasks(results: Sequence[Path], model: str) -> list[Task]:
    """Raises DataError for results that are of another model."""
    if not results:
        return []
    from cafe.errors import DataError
    from cafe.evaluate.compare import collect
    from cafe.model.location import lasting_name
    from cafe.report.card import Task

    tasks = []
    for of_task in collect(results):
        for result in of_task:
            if lasting_name(result.model) != lasting_name(model):
                raise DataError(
                    f"--results: {result.task} was measured on {result.model}, not on {model}; "
                    f"evaluate it: cafe evaluate {model} --task {result.task} --json DIR"
                )
            record = result.record
            intervals = {name: (low, high) for name, (low, high) in record["intervals"].items()}
            tasks.append(Task(result.task, record["count"], record["scores"], intervals))
    return tasks


def _write_card(
    directory: Path,
    name: str,
    done: Export,
    agreements: Sequence[Agreement],
    tasks: Sequence[Task],
) -> None:
    """Beside an adapter there is peft's own card, and that one stays."""
    from importlib import metadata

    from cafe.model.adapter import is_adapter
    from cafe.report.card import model_card

    if is_adapter(directory):
        return
    facts = {
        "family": done.family,
        "parameters": f"{done.parameters:,}",
        "weights": str(done.dtype).removeprefix("torch."),
        "embedding": f"{done.dimension} numbers, unit length, cosine",
        "written by": f"cafe-vlm {metadata.version('cafe-vlm')}",
    }
    card = model_card(name, done.dimension, facts, agreements, tasks)
    (directory / "README.md").write_text(card, encoding="utf-8")
