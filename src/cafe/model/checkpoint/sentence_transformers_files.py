"""The files of a saved directory that make sentence-transformers read it as this library does.

vLLM reads them, too. `cafe.model.checkpoint.directory` writes them.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cafe.errors import CheckpointError

EMBEDDING_TEMPLATE = "embedding_template.jinja"

NAMED_TEMPLATES = "additional_chat_templates"
"""Where versions before wrote it, as a named chat template."""


def embedding_template_of(directory: Path) -> str:
    """The Jinja text of a saved directory's embedding template.

    Raises:
        CheckpointError: there is none.
    """
    for name in (EMBEDDING_TEMPLATE, f"{NAMED_TEMPLATES}/embedding.jinja"):
        if (directory / name).is_file():
            return (directory / name).read_text(encoding="utf-8")
    raise CheckpointError(
        f"{directory}: no {EMBEDDING_TEMPLATE}; write the directory with cafe export"
    )


def is_cross_encoder(directory: Path) -> bool:
    """Whether sentence-transformers' own file says so (`cafe.release.cross_encoder`)."""
    try:
        file = directory / "config_sentence_transformers.json"
        return json.loads(file.read_text(encoding="utf-8")).get("model_type") == "CrossEncoder"
    except (OSError, ValueError, AttributeError):
        return False


def sentence_transformers_files(hidden_size: int, template: str) -> dict[str, Any]:
    """Contents by file name. The old type strings load in vLLM and in ST 3 to 6."""
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
            "processing_kwargs": {"chat_template": {"chat_template": template}},
        },
        "1_Pooling/config.json": {
            "embedding_dimension": hidden_size,
            "pooling_mode": "lasttoken",
            "include_prompt": True,
        },
        "2_Normalize/config.json": {},
    }
