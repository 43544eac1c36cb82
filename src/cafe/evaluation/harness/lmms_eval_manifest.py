"""Registers the model `cafe` with lmms-eval (entry point group `lmms_eval.models`)."""

from __future__ import annotations

from typing import Any

_MODULE = "cafe.evaluation.harness.lmms_eval_model"


def manifest() -> Any:
    """lmms-eval's `ModelManifest`; lmms-eval calls this, so the class can be imported."""
    from lmms_eval.models.registry_v2 import (  # pyright: ignore[reportMissingImports]
        ModelManifest,
    )

    return ModelManifest(
        model_id="cafe",
        chat_class_path=f"{_MODULE}.CafeChat",
        simple_class_path=f"{_MODULE}.CafeSimple",
    )
