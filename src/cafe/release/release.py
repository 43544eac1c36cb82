"""Publish a model as one directory that every tool loads: exported, verified, and described.

The directory appears complete or not at all, and only after the written model embeds the probes as
the source does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from cafe.errors import CheckpointError, DataError
from cafe.evaluation.compare import results_by_task
from cafe.files import whole_directory
from cafe.model.checkpoint.adapter import adapter_of, is_adapter, merge_into_base
from cafe.model.checkpoint.directory import weights_dtype
from cafe.model.checkpoint.locate import lasting_name, locate
from cafe.model.multi_vector import token_projection_of
from cafe.model.rows.prompts import trained_thought_tokens
from cafe.model.vlm import CAFe
from cafe.release.card import Agreement, CardTask, model_card
from cafe.release.verify import EXACT, check_readable_by_all, probe_inputs
from cafe.release.verify import verify as verify_directory

ROUNDED = 5e-2
"""Tolerance of a merge into 16-bit weights: the sum is rounded to 16 bits, whereas base and adapter
kept apart are not. It is a cosine of 0.999; the bundled model with a trained LoRA is at 2e-3."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written, and how its embeddings of the probes differ from the source's.

    directory   the published directory
    merged      whether an adapter was merged into its base
    dtype       of the written weights; a merged adapter takes its base's
    distance    largest distance between a probe's two unit-length embeddings, in float32
    tolerance   largest distance allowed
    probes      number of texts and images that were embedded
    family      transformers' model type
    parameters  of the whole model, including an adapter's
    dimension   of an embedding
    averages    how many latent tokens' states an embedding is the mean of; 0: the last token's
    agreements  of the other tools, when they were asked
    tokens      dimension of the vector that each token has as well; 0: it has none
    thoughts    tokens of the longest thought that it was trained to embed after; 0: none
    """

    directory: Path
    merged: bool
    dtype: torch.dtype
    distance: float
    tolerance: float
    probes: int
    family: str
    parameters: int
    dimension: int
    averages: int = 0
    agreements: tuple[Agreement, ...] = ()
    thoughts: int = 0
    tokens: int = 0


def export(
    model: str | Path,
    to: str | Path,
    *,
    merge: bool = False,
    verify: bool = False,
    results: Sequence[str | Path] = (),
    on_agreement: Callable[[Agreement], None] | None = None,
) -> ExportReport:
    """Write `model` to the new directory `to`, with a model card, and check what was written.

    The written model is read back and must embed the probes as `model` does. An adapter stays an
    adapter, which only peft and cafe load, unless it is merged; next to it peft's own card stays.

        >>> from cafe.release.release import export
        >>> report = export("tiny", "published")
        >>> report.family, report.dimension, f"{report.distance:.0e}"
        ('llava_onevision', 256, '0e+00')

    Args:
        model: "tiny", a checkpoint directory, or a hub id.
        to: A directory that does not exist yet, or is empty.
        merge: Add an adapter's updates to its base's weights, which gives a whole model.
        verify: Also embed the probes with the other tools (`cafe.release.verify`).
        results: Results of `cafe evaluate` for the model card: files, or folders of them.
        on_agreement: Called after each tool that `verify` checks.

    Raises:
        CheckpointError: `to` is not new or cannot be written, there is no adapter to merge, or
            embeddings differ. Nothing is left at `to`.
        DataError: `results` cannot be read or are of another model.
        CafeError: a tool that `verify` needs is not installed.
    """
    to = Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CheckpointError(f"{to}: already exists; name a new directory")
    if verify and not merge:
        check_readable_by_all(locate(model))
    tasks = _card_tasks(results, model)
    try:
        with whole_directory(to.absolute()) as unfinished:
            report = replace(_write_model(model, unfinished, merge), directory=to)
            if verify:
                verified = verify_directory(unfinished, on_agreement=on_agreement)
                report = replace(report, agreements=verified.agreements)
            if not is_adapter(unfinished):  # peft writes its own card next to an adapter
                card = _card(report, tasks)
                (unfinished / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{to}: cannot be written ({' '.join(str(error).split())})"
        ) from error
    return report


def merge_adapter(adapter: str | Path, to: str | Path, *, verify: bool = False) -> ExportReport:
    """Write an adapter and its base as one whole model, in the new directory `to`.

    The same as `export` with `merge`. Without an adapter it is an error.

    Args:
        adapter: A directory or hub id of LoRA or DoRA weights that names its base.
        to: A directory that does not exist yet, or is empty.
        verify: Also embed the probes with the other tools (`cafe.release.verify`).

    Raises:
        CheckpointError: as in `export`.
    """
    return export(adapter, to, merge=True, verify=verify)


def _write_model(source: str | Path, directory: Path, merge: bool) -> ExportReport:
    """Write the model `source` to `directory`, read it back, and compare embeddings."""
    model = CAFe.from_pretrained(source, dtype=torch.float32)
    adapted = adapter_of(model.model) is not None
    if merge and not adapted:
        raise CheckpointError(f"model {str(source)!r}: has no adapter to merge; leave merge out")
    probes = probe_inputs()
    before = model.encode(probes)
    if merge:
        merge_into_base(model.model)
    dtype = torch.float32 if adapted and not merge else weights_dtype(source)
    model.model.to(dtype)
    model.save_pretrained(directory)
    family, dimension = str(model.model.config.model_type), model.embedding_dimension
    averages = model.collator.averages
    thoughts = trained_thought_tokens(model.model.config)
    projection = token_projection_of(model.model)
    parameters = sum(p.numel() for p in model.model.parameters())
    del model  # so that two large models are never in memory together
    after = CAFe.from_pretrained(directory, dtype=torch.float32).encode(probes)
    distance = float(np.linalg.norm(after - before, axis=1).max())
    tolerance = ROUNDED if merge and dtype != torch.float32 else EXACT
    if not distance <= tolerance:  # written so that NaN fails too
        what = "merging" if merge else "writing"
        raise CheckpointError(
            f"model {str(source)!r}: after {what} it, embeddings of {len(probes)} probes are up to "
            f"{distance:.1e} apart, more than {tolerance:.0e}; keep the adapter next to its base, "
            "or train it again on a base in float32"
        )
    return ExportReport(
        directory,
        merge,
        dtype,
        distance,
        tolerance,
        len(probes),
        family,
        parameters,
        dimension,
        averages,
        thoughts=thoughts,
        tokens=0 if projection is None else projection.out_features,
    )


def _card_tasks(results: Sequence[str | Path], model: str | Path) -> list[CardTask]:
    """The scores of result files. Raises DataError for those of another model."""
    tasks = []
    for of_task in results_by_task([Path(path) for path in results]):
        for result in of_task:
            if lasting_name(result.model) != lasting_name(model):
                raise DataError(
                    f"results: {result.task} was measured on {result.model}, not on {model}; "
                    f"evaluate it: cafe evaluate {model} --task {result.task} --json DIR"
                )
            record = result.record
            intervals = {name: (low, high) for name, (low, high) in record["intervals"].items()}
            tasks.append(CardTask(result.task, record["count"], record["scores"], intervals))
    return tasks


def _card(report: ExportReport, tasks: Sequence[CardTask]) -> str:
    facts = {
        "family": report.family,
        "parameters": f"{report.parameters:,}",
        "weights": str(report.dtype).removeprefix("torch."),
        "embedding": f"{report.dimension} numbers, unit length, cosine",
        "written by": f"cafe-vlm {metadata.version('cafe-vlm')}",
    }
    if report.thoughts:
        facts["thoughts"] = (
            f"an image's embedding may also be read after what the model says of it, in at most "
            f"{report.thoughts} tokens: `encode(images, think={report.thoughts})`"
        )
    name = report.directory.name
    if report.tokens:
        facts["token vectors"] = (
            f"{report.tokens} numbers for every token, compared by MaxSim: `encode_tokens`; "
            f'sentence-transformers: `MultiVectorEncoder("{name}/multi_vector")`'
        )
    return model_card(name, report.dimension, facts, report.agreements, tasks, report.averages)
