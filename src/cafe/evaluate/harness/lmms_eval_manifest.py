"""Tells lmms-eval that there is a model `cafe` (entry point group `lmms_eval.models`)."""

from __future__ import annotations

from typing import Any

_MODULE = "cafe.evaluate.harness.lmms_eval_model"


def manifest() -> Any:
    """lmms-eval's `ModelManifest`; called by lmms-eval, which is the only one to have the class."""
    from lmms_eval.models.registry_v2 import (  # pyright: ignore[reportMissingImports]
        ModelManifest,
    )

    return ModelManifest(
        model_id="cafe",
        chat_class_path=f"{_MODULE}.CafeChat",
        simple_class_path=f"{_MODULE}.CafeSimple",
    )
