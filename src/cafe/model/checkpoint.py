"""One directory for every tool.

The directory is an ordinary transformers checkpoint of the *generation* model, `lm_head` intact,
plus the five small files that make sentence-transformers (and vLLM, which reads them) pool and
format as this library does, without custom code:

    config.json  generation_config.json  model*.safetensors     transformers
    processor_config.json  tokenizer*.json  chat_template.jinja
    additional_chat_templates/embedding.jinja                   how an embedding is asked for
    modules.json  config_sentence_transformers.json             sentence-transformers
    sentence_bert_config.json  1_Pooling/  2_Normalize/

Never write it through `SentenceTransformer.save_pretrained`: that drops `lm_head`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cafe.errors import CafeError, CheckpointError
from cafe.model.collate import Collator
from cafe.model.families import family_of
from cafe.model.prompts import DEFAULT_PROMPT, default_chat_template
from cafe.model.tiny import TINY_DIR

EMBEDDING_TEMPLATE = "embedding"

HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"]
"""What is downloaded of a hub model: no pickled weights, no code."""


def load_pretrained(
    name_or_dir: str | Path, *, dtype: torch.dtype, attention: str
) -> tuple[Any, Any]:
    """The transformers model and processor of a directory, a hub id (owner/name), or "tiny".

    Raises CheckpointError when nothing is there, weights are missing or do not match;
    FamilyError, before any weight is read, for a family without facts.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    name = f"model {str(name_or_dir)!r}"
    path = _directory(name, name_or_dir)
    try:
        with _quiet():
            family_of(AutoConfig.from_pretrained(path))
            processor = AutoProcessor.from_pretrained(path)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # collected in `info`, and refused below
                output_loading_info=True,
            )
    except CafeError:
        raise
    except Exception as error:  # parsers of many files: they raise whatever they like
        raise CheckpointError(f"{name}: cannot be loaded ({_first_line(error)})") from error
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


def _directory(name: str, name_or_dir: str | Path) -> Path:
    """The directory that holds the model, downloaded if it is a hub id.

    One request, so that without a network it fails at once: transformers alone would ask for a
    dozen files, each with its retries.
    """
    source = str(name_or_dir)
    path = TINY_DIR if source == "tiny" else Path(source).expanduser()
    if not path.is_dir():
        if path == TINY_DIR or path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
            raise CheckpointError(f"{name}: no such directory; give one, or a hub id (owner/name)")
        import huggingface_hub

        try:
            path = Path(huggingface_hub.snapshot_download(source, allow_patterns=HUB_FILES))
        except Exception as error:  # no network, no such model, no access, full disk, …
            raise CheckpointError(
                f"{name}: neither a directory here nor found on the hub ({_first_line(error)})"
            ) from error
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{name}: no config.json in {path}; give a checkpoint directory")
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{name}: no *.safetensors weights in {path}; save the model there again "
            "(pickled weights are not read: they can run code)"
        )
    return path


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
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


def save_checkpoint(model: Any, processor: Any, collator: Collator, directory: Path) -> None:
    """Write model, processor and the sentence-transformers files to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    with _quiet():
        model.save_pretrained(directory)
    save_processor(processor, collator, directory)
    hidden = int(model.config.get_text_config().hidden_size)
    for name, content in _sentence_transformers_files(hidden).items():
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n")


def save_processor(processor: Any, collator: Collator, directory: Path) -> None:
    """The processor with both of its templates."""
    named = processor.chat_template
    processor.chat_template = {
        "default": default_chat_template(processor),
        EMBEDDING_TEMPLATE: collator.template(DEFAULT_PROMPT),
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
