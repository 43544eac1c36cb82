"""The weights of a LLaVA-NeXT checkpoint: names, checks, and writing them under their new names.

See `cafe.model.checkpoint.convert` for the two layouts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cafe.errors import CheckpointError

_TOWER = "model.vision_tower.vision_tower.vision_model."
_RENAMED = (
    (_TOWER, "vision_tower.vision_model."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.layers.", "language_model.model.layers."),
    ("model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
)

_IGNORED = ("img_emb_head.", "text_emb_head.", f"{_TOWER}head.")
"""What the original allocates but does not use: CAFe's heads (off by default), the pooling head."""


def read_headers(source: Path) -> tuple[dict[str, list[str]], dict[str, list[int]]]:
    """Read the headers of all shards, no weights.

    Returns:
        The weights' names by file name, and their shapes by name.

    Raises:
        CheckpointError: no safetensors, a file that cannot be read, or a weight in two files.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{source}: no *.safetensors weights; save the model with safe_serialization=True "
            "(pickled weights are not read: they can run code)"
        )
    names: dict[str, list[str]] = {}
    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                names[file.name] = list(shard.keys())
                for name in names[file.name]:
                    if name in shapes:
                        raise CheckpointError(
                            f"{file}: {name} is in another shard too; remove the files of other "
                            "saves"
                        )
                    shapes[name] = shard.get_slice(name).get_shape()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from error
    return names, shapes


def is_ignored(name: str, layers: int, tied: bool) -> bool:
    """Whether the original never reads this weight. `layers`: how many its tower keeps."""
    layer = re.match(re.escape(_TOWER) + r"encoder\.layers\.(\d+)\.", name)
    return (
        name.startswith(_IGNORED)
        or name.endswith((".inv_freq", ".position_ids"))  # buffers that are computed now
        or (layer is not None and int(layer[1]) >= layers)
        or (tied and name.startswith("lm_head."))
    )


def _renamed(name: str) -> str | None:
    return next((new + name[len(old) :] for old, new in _RENAMED if name.startswith(old)), None)


def check_weights(
    source: Path, shapes: dict[str, list[int]], ignored: set[str], config: Any
) -> None:
    """Check that the weights are exactly those of the model that `config` builds.

    Raises:
        CheckpointError: a missing, unknown or misshapen weight.
    """
    from transformers import LlavaOnevisionForConditionalGeneration

    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(config)
    expected = {_on_disk(name): list(p.shape) for name, p in model.named_parameters()}
    present = {_renamed(name): (name, s) for name, s in shapes.items() if name not in ignored}
    unknown = [n for n in shapes if n not in ignored and _renamed(n) not in expected]
    back = {new: old for old, new in _RENAMED}
    missing = [
        next((old + name[len(new) :] for new, old in back.items() if name.startswith(new)), name)
        for name in expected
        if name not in present
    ]
    wrong = [
        f"{present[name][0]} {present[name][1]} instead of {shape}"
        for name, shape in expected.items()
        if name in present and present[name][1] != shape
    ]
    for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise CheckpointError(
                f"{source}: weights are {what}: {', '.join(sorted(names)[:5])}{more}; is this a "
                "whole LLaVA-NeXT checkpoint, and its own config.json?"
            )


def _on_disk(name: str) -> str:
    """The name that transformers gives a parameter of this family in files."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    name = re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)
    return re.sub(r"^language_model\.", "language_model.model.", name)


# ---------------------------------------------------------------------- the weights


def write_weights(
    source: Path, target: Path, names: dict[str, list[str]], ignored: set[str]
) -> tuple[int, int, int]:
    """Write one shard for each source shard. Returns numbers of shards, tensors and bytes."""
    from safetensors.torch import save_file

    kept = {file: [n for n in own if n not in ignored] for file, own in names.items()}
    kept = {file: own for file, own in kept.items() if own}
    weight_map: dict[str, str] = {}
    size = 0
    for number, (file, own) in enumerate(kept.items(), 1):
        shard = (
            "model.safetensors"
            if len(kept) == 1
            else f"model-{number:05d}-of-{len(kept):05d}.safetensors"
        )
        tensors = dict(_read(source / file, own))
        save_file(tensors, target / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(kept) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return len(kept), len(weight_map), size


def _read(file: Path, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as shard:
        for name in names:
            new = _renamed(name)
            assert new is not None, name  # check_weights has passed
            yield new, shard.get_tensor(name)
