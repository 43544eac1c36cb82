"""The folder `multi_vector/` of a saved model: its token projection, for sentence-transformers.

    multi_vector/
        1_Dense/model.safetensors          the projection's weight
        modules.json …                     what `MultiVectorEncoder` loads: Transformer, Dense,
                                           MultiVectorMask, Normalize, all of them of tokens
        config.json  tokenizer.json …      copies of the small files beside the weights
        model.safetensors.index.json       names the weights where they are, in `../`

One directory cannot serve both classes by one modules.json: sentence-transformers would report the
projection's dimension as that of the embedding, and vLLM applies every Dense that is named there to
the embedding. So the files above it stay as they are without a projection, byte for byte, and the
weights, which are in the index as `../model.safetensors`, are not there twice. That is a path, and
no link, so copies and archives keep it; a tool that opens no file outside of its folder (vLLM, the
hub) needs them copied into the folder, and the index deleted.

An adapter's directory has `1_Dense` only.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cafe.errors import CheckpointError, first_line
from cafe.model.checkpoint.locate import WEIGHTS_INDEX

MULTI_VECTOR = "multi_vector"
_DENSE = "1_Dense"
_WEIGHTS, _KEY = "model.safetensors", "linear.weight"


def save_projection(weight: Tensor, directory: Path) -> None:
    """Write the projection itself into a model's or an adapter's directory."""
    dense = directory / MULTI_VECTOR / _DENSE
    dense.mkdir(parents=True, exist_ok=True)
    settings = {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
        "module_input_name": "token_embeddings",
        "module_output_name": "token_embeddings",
    }
    _write(dense / "config.json", settings)
    tensors = {_KEY: weight.detach().cpu().contiguous()}
    save_file(tensors, dense / _WEIGHTS, metadata={"format": "pt"})


def load_projection(directory: Path, hidden: int) -> Tensor | None:
    """The weight [dim, hidden] in a model's or an adapter's directory; None: there is none.

    Args:
        directory: the model's or adapter's.
        hidden: the width of the model's states.

    Raises:
        CheckpointError: it cannot be read, is of another model, or is not in the folder.
    """
    file = directory / MULTI_VECTOR / _DENSE / _WEIGHTS
    again = f"copy {MULTI_VECTOR} again from the model that it is of, or delete it"
    if not file.is_file():
        if file.parent.parent.is_dir():
            raise CheckpointError(f"{file}: is missing; {again}")
        return None
    try:
        weight = load_file(file)[_KEY]
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{file}: cannot be read ({first_line(error)})") from error
    if weight.ndim != 2 or weight.shape[1] != hidden:
        raise CheckpointError(
            f"{file}: {_KEY} is {list(weight.shape)}, and the model's states have {hidden} "
            f"dimensions; {again}"
        )
    if not len(weight) or not weight.is_floating_point() or not bool(weight.isfinite().all()):
        raise CheckpointError(f"{file}: {_KEY} holds no finite numbers; {again}")
    return weight


def remove_projection(directory: Path) -> None:
    """Remove the folder that a model with a projection has left there."""
    shutil.rmtree(directory / MULTI_VECTOR, ignore_errors=True)


def save_modules(directory: Path) -> None:
    """Write what `MultiVectorEncoder` needs beside the projection, once the rest is written."""
    folder = directory / MULTI_VECTOR
    for file in directory.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model"):
            shutil.copyfile(file, folder / file.name)
    _write(folder / WEIGHTS_INDEX, _index(directory))
    module = "sentence_transformers."
    kinds = (
        ("", "models.Transformer"),
        (_DENSE, "models.Dense"),
        ("2_MultiVectorMask", "multi_vector_encoder.modules.MultiVectorMask"),
        ("3_Normalize", "models.Normalize"),
    )
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": module + kind}
        for i, (path, kind) in enumerate(kinds)
    ]
    _write(folder / "modules.json", modules)
    whole = {"skiplist_words": [], "skiplist_tasks": ["document"], "keep_only_token_ids": None}
    _write(folder / "2_MultiVectorMask" / "config.json", whole)
    tokens = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    _write(folder / "3_Normalize" / "config.json", tokens)
    name = "config_sentence_transformers.json"
    settings = json.loads((directory / name).read_text())
    kind = {"model_type": "MultiVectorEncoder", "similarity_fn_name": "meanmaxsim"}
    _write(folder / name, settings | kind)


def _index(directory: Path) -> dict[str, Any]:
    """The index of the weights in the folder above, as transformers reads it."""
    places: dict[str, str] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            places |= dict.fromkeys(tensors.keys(), f"../{file.name}")
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return {"metadata": {"total_size": size}, "weight_map": places}


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
