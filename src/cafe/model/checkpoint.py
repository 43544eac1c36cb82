"""One directory for every tool.

The directory is an ordinary transformers checkpoint of the *generation* model, `lm_head` intact,
plus the five small files that make sentence-transformers (and vLLM, which reads them) pool and
format as this library does, without custom code:

    config.json  generation_config.json  model*.safetensors     transformers
    processor_config.json  tokenizer*.json  chat_template.jinja
    additional_chat_templates/embedding.jinja                   how an embedding is asked for
    modules.json  config_sentence_transformers.json             sentence-transformers
    sentence_bert_config.json  1_Pooling/  2_Normalize/

A model with an adapter leaves an adapter's directory (`cafe.model.adapter`).

Never write it through `SentenceTransformer.save_pretrained`: that drops `lm_head`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cafe.errors import CafeError, CheckpointError
from cafe.model.adapter import adapter_of, base_of, is_adapter, load_adapter, save_adapter
from cafe.model.collate import Collator
from cafe.model.families import family_of
from cafe.model.location import first_line, locate
from cafe.model.prompts import DEFAULT_PROMPT, default_chat_template

EMBEDDING_TEMPLATE = "embedding"


def load_pretrained(
    name_or_dir: str | Path,
    *,
    dtype: torch.dtype,
    attention: str,
    adapter: str | Path | None = None,
    quantization: Any = None,
) -> tuple[Any, Any]:
    """The transformers model and processor of a directory, a hub id (owner/name), or "tiny".

    A directory with an adapter loads its base and the adapter beside it (`cafe.model.adapter`).

    adapter        a directory or hub id of an adapter for this base
    quantization   transformers' configuration of a base in fewer bits
    Raises CheckpointError when nothing is there, weights are missing or do not match;
    FamilyError, before any weight is read, for a family without facts.
    """
    path = locate(name_or_dir)
    if is_adapter(path):
        if adapter is not None:
            raise CheckpointError(
                f"model {str(name_or_dir)!r}: is an adapter itself, so it cannot take {adapter}; "
                "merge it first: cafe export"
            )
        adapter, name_or_dir = path, base_of(path)
    if adapter is None:
        return _load_whole(name_or_dir, dtype, attention, quantization)
    adapter = locate(adapter, "adapter")
    # Ours comes with the processor that it was trained with, peft's own directories have none.
    processor_dir = adapter if (adapter / "processor_config.json").is_file() else None
    model, processor = _load_whole(name_or_dir, dtype, attention, quantization, processor_dir)
    load_adapter(model, adapter)
    return model.to(dtype), processor


def _load_whole(
    name_or_dir: str | Path,
    dtype: torch.dtype,
    attention: str,
    quantization: Any,
    processor_dir: Path | None = None,
) -> tuple[Any, Any]:
    """A model with all of its weights, and its processor or the one in `processor_dir`."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    name = f"model {str(name_or_dir)!r}"
    path = _checked(name, locate(name_or_dir))
    try:
        with quiet():
            family_of(AutoConfig.from_pretrained(path))
            processor = AutoProcessor.from_pretrained(processor_dir or path)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=kernels(attention),
                quantization_config=quantization,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # collected in `info`, and refused below
                output_loading_info=True,
            )
    except CafeError:
        raise
    except Exception as error:  # parsers of many files: they raise whatever they like
        raise CheckpointError(f"{name}: cannot be loaded ({first_line(error)})") from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(m[0]) for m in info["mismatched_keys"])
    if missing or mismatched:
        raise CheckpointError(
            f"{name}: {len(missing)} weights are missing and {len(mismatched)} have another "
            f"shape than config.json says (first: {[*missing, *mismatched][0]}); copy config and "
            "weights again, from one model"
        )
    return model, processor


def kernels(attention: str) -> str | dict[str, str]:
    """The attention kernel of each part, as transformers takes it.

    FlexAttention is for the language model, whose rows branch: a tower has no such mask, and its
    heads may have a width that the kernel does not take.
    """
    if attention != "flex_attention":
        return attention
    return {"": attention, "text_config": attention, "vision_config": "sdpa"}


def weights_dtype(name_or_dir: str | Path) -> torch.dtype:
    """The type that the model's own weights were saved in; of an adapter, its base's."""
    from transformers import AutoConfig

    path = locate(name_or_dir)
    if is_adapter(path):
        path = locate(base_of(path))
    dtype = AutoConfig.from_pretrained(path).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _checked(name: str, path: Path) -> Path:
    """`path`, which holds a configuration and weights."""
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{name}: no config.json in {path}; give a checkpoint directory")
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{name}: no *.safetensors weights in {path}; save the model there again "
            "(pickled weights are not read: they can run code)"
        )
    return path


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars and reports: what matters of them becomes a CheckpointError."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def save_checkpoint(
    model: Any,
    processor: Any,
    collator: Collator,
    directory: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write model, processor and the sentence-transformers files to `directory`.

    A model with an adapter leaves the adapter only, in peft's format. sentence-transformers cannot
    put that on its bare model (other layer names) and would pool another token, so it finds
    nothing there; merge the adapter for it.

    weights   parameter name -> tensor, when those in the model are pieces of them
    """
    directory.mkdir(parents=True, exist_ok=True)
    if adapter_of(model) is not None:
        save_adapter(model, directory, weights)
        save_processor(processor, collator, directory)
        return
    with quiet():
        (model if weights is None else _twin(model, weights)).save_pretrained(directory)
    save_processor(processor, collator, directory)
    hidden = int(model.config.get_text_config().hidden_size)
    for name, content in _sentence_transformers_files(hidden).items():
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n")


def _twin(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A model of the same configuration around `weights`; for saving only."""
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    twin.load_state_dict(weights, strict=False, assign=True)
    twin.tie_weights()
    twin.generation_config = model.generation_config
    return twin


def save_processor(processor: Any, collator: Collator, directory: Path) -> None:
    """The processor with both of its templates."""
    named = processor.chat_template
    processor.chat_template = {
        "default": default_chat_template(processor),
        EMBEDDING_TEMPLATE: collator.render.template(DEFAULT_PROMPT),
    }
    try:
        processor.save_pretrained(directory)
    finally:
        processor.chat_template = named


def _sentence_transformers_files(hidden_size: int) -> dict[str, Any]:
    """File name -> content; the old type strings load in every version (peers: vLLM, ST 3 to 6)."""
    module = "sentence_transformers.models."
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    return {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": module + "Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": module + "Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": module + "Normalize"},
        ],
        "config_sentence_transformers.json": {
            "__version__": {
                "pytorch": torch.__version__,
                "sentence_transformers": "6.2.0",
                "transformers": metadata.version("transformers"),
            },
            "default_prompt_name": None,
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "similarity_fn_name": "cosine",
        },
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {
                "text": forward,
                "image": forward,
                "message": {**forward, "format": "structured"},
            },
            "module_output_name": "token_embeddings",
            "processing_kwargs": {"chat_template": {"chat_template": EMBEDDING_TEMPLATE}},
        },
        "1_Pooling/config.json": {
            "embedding_dimension": hidden_size,
            "pooling_mode": "lasttoken",
            "include_prompt": True,
        },
        "2_Normalize/config.json": {},
    }
