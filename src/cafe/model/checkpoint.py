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
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cafe.errors import CheckpointError
from cafe.model.collate import Collator
from cafe.model.prompts import DEFAULT_PROMPT, default_chat_template
from cafe.model.tiny import TINY_DIR


EMBEDDING_TEMPLATE = "embedding"


def load_pretrained(
    name_or_dir: str | Path, *, dtype: torch.dtype, attention: str
) -> tuple[Any, Any]:
    """The transformers model and processor of a directory, a hub id, or "tiny".

    Raises CheckpointError when nothing is there, weights are missing or do not match.
    """

    from transformers import AutoModelForImageTextToText, AutoProcessor

    source = str(TINY_DIR if str(name_or_dir) == "tiny" else name_or_dir)
    path = Path(source)
    if path.is_dir():
        _check_directory(path)
    elif path.exists() or source.startswith((".", "/", "~")):
        raise CheckpointError(f"model {source!r}: not a directory; give a checkpoint directory")
    try:
        processor = AutoProcessor.from_pretrained(source)
        model, info = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"model {source!r}: cannot be loaded ({reason})") from error
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(m[0]) for m in info.get("mismatched_keys", ()))
    if missing or mismatched:
        raise CheckpointError(
            f"model {source!r}: {len(missing)} weights are missing and {len(mismatched)} have "
            f"another shape (first: {[*missing, *mismatched][0]}); the files are not this model's"
        )
    return model, processor


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"model {str(path)!r}: no config.json in that directory")
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"model {str(path)!r}: no *.safetensors weights in that directory "
            "(pickled weights are not read: they can run code)"
        )


def save_checkpoint(model: Any, processor: Any, collator: Collator, directory: Path) -> None:
    """Write model, processor and the sentence-transformers files to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
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
