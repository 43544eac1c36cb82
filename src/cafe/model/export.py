"""A model written anew as one directory for every tool, and checked to embed as it did before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from cafe.errors import CheckpointError
from cafe.model.adapter import adapter_of, merge_adapter
from cafe.model.checkpoint import weights_dtype
from cafe.model.inputs import Input
from cafe.model.vlm import CAFe

EXACT = 1e-4
"""Distance between two unit-length embeddings that sums in another order explain."""

ROUNDED = 5e-2
"""The same for a merge into weights of 16 bits: the sum is rounded to them, base and adapter apart
are not. It is a cosine of 0.999; the bundled model with a trained LoRA is at 2e-3."""


@dataclass(frozen=True, slots=True)
class Export:
    """What was written, and how its embeddings of the probes differ from the source's.

    dtype       of the written weights; a merged adapter takes its base's
    distance    the largest between a probe's two unit-length embeddings, computed in float32
    tolerance   what it may be
    probes      how many texts and pictures were embedded
    family      transformers' model type
    parameters  of the whole model, an adapter's included
    dimension   of an embedding
    """

    dtype: torch.dtype
    distance: float
    tolerance: float
    probes: int
    family: str
    parameters: int
    dimension: int


def export(source: str | Path, directory: Path, *, merge: bool = False) -> Export:
    """Write the model `source` to `directory`, read it back, and compare embeddings.

    merge   add an adapter's updates to its base's weights; the directory then is a whole model
    Raises CheckpointError when there is no adapter to merge, or when the embeddings differ.
    """
    core = CAFe.from_pretrained(source, dtype=torch.float32)
    adapted = adapter_of(core.model) is not None
    if merge and not adapted:
        raise CheckpointError(f"model {str(source)!r}: has no adapter to merge; leave merge out")
    probes = probe_inputs()
    before = core.encode(probes)
    if merge:
        merge_adapter(core.model)
    dtype = torch.float32 if adapted and not merge else weights_dtype(source)
    core.model.to(dtype)
    core.save_pretrained(directory)
    family, dimension = str(core.model.config.model_type), core.embedding_dimension
    parameters = sum(p.numel() for p in core.model.parameters())
    del core  # two large models need not be in memory at once
    after = CAFe.from_pretrained(directory, dtype=torch.float32).encode(probes)
    distance = float(np.linalg.norm(after - before, axis=1).max())
    tolerance = ROUNDED if merge and dtype != torch.float32 else EXACT
    if not distance <= tolerance:  # NaN is too far, too
        what = "merging" if merge else "writing"
        raise CheckpointError(
            f"model {str(source)!r}: after {what} it, embeddings of {len(probes)} probes are up to "
            f"{distance:.1e} apart, more than {tolerance:.0e}; keep the adapter beside its base, "
            "or train it again on a base in float32"
        )
    return Export(dtype, distance, tolerance, len(probes), family, parameters, dimension)


def probe_inputs() -> list[Input]:
    """Texts, pictures and both together; always the same."""
    rng = np.random.default_rng(0)
    sizes = [(96, 96), (160, 96), (96, 224)]
    pictures = [
        PIL.Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]
    return [
        "a red mug on a table",
        "two dogs run across a wide field under a dark sky, and a child looks on",
        "yes",
        *pictures,
        {"image": pictures[0], "text": "what is at the top left"},
    ]
