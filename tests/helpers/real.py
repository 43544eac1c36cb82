"""Published tokenizers, templates, processor settings, photographs: they lie beside the project."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from unittest import mock

import pytest

_BESIDE = Path(__file__).parents[2].parent / "shared" / "real"
REAL = Path(os.environ.get("CAFE_REAL_MATERIAL") or _BESIDE)


def material(name: str = "build_hub.py") -> Path:
    """A file or folder of the real material; skips the test where there is none."""
    if not (REAL / name).exists():
        pytest.skip(f"no {name} in ../shared/real (or set CAFE_REAL_MATERIAL)")
    return REAL / name


def build_hub(out: Path) -> Path:
    """Write the published families' directories, with few layers and random weights, to `out`."""
    spec = importlib.util.spec_from_file_location("build_hub", material())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with mock.patch.object(sys, "argv", ["build_hub.py", str(out)]):
        module.main()
    return out
