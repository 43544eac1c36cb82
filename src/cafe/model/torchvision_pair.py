"""Make torchvision import next to a torch it was not built for.

torchvision's registry wheel is compiled against CUDA. Beside a CPU-only torch its compiled
operators do not load; that alone is harmless, but importing it also registers shape functions for
two of them, `nms` and `qnms`, and dies with "operator torchvision::nms does not exist". Declaring
the two schemas lets the import pass. Whoever calls these operators still gets a clear
NotImplementedError; resizing and cropping, all that processors need, are plain torch.

Without torchvision, transformers can build no processor that has a video part (LLaVA-OneVision,
Qwen-VL, SmolVLM, InternVL), and says so obscurely. So `ensure_torchvision` comes before any
processor is built.
"""

from __future__ import annotations

import importlib
import sys

import torch

from cafe.errors import CafeError

MEND = "install the pair again, e.g. pip install torch==2.13.0 torchvision==0.28.0"

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# torch forgets operators when the Library that declared them is collected.
_declared: list[torch.library.Library] = []


def ensure_torchvision() -> None:
    """Import torchvision; declare the two missing operators first where that fails without them.

    Changes nothing where torchvision works. Raises CafeError when it is missing or broken.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise CafeError(
            f"{error.name} is not installed, picture processors need it; {MEND}"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        if "torchvision::" not in str(error) or _declared:
            raise _broken(error) from error
        _declare()
        try:
            importlib.import_module("torchvision")
        except (ImportError, OSError, RuntimeError) as again:
            raise _broken(again) from again


def operators_declared() -> bool:
    """Whether the two schemas stand in for torchvision's compiled operators."""
    return bool(_declared)


def _declare() -> None:
    half_imported = [name for name in sys.modules if name.split(".")[0] == "torchvision"]
    for name in half_imported:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)


def _broken(error: Exception) -> CafeError:
    reason = str(error).splitlines()[0]
    return CafeError(f"torchvision does not work with torch {torch.__version__} ({reason}); {MEND}")
