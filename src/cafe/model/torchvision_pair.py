"""Make torchvision import next to a torch it was not built for.

torchvision's registry wheel is compiled against CUDA. With a CPU-only torch its compiled operators
do not load. That would be harmless, but importing it also registers shape functions for two of
them, `nms` and `qnms`, and fails with "operator torchvision::nms does not exist". Declaring the two
schemas makes the import succeed. Calling these operators still raises a clear NotImplementedError;
resizing and cropping, all that processors need, are plain torch.

Without torchvision, transformers can build no processor that has a video part (LLaVA-OneVision,
Qwen-VL, SmolVLM, InternVL), and its error does not name the cause. So `ensure_torchvision` runs
before any processor is built.
"""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import dataclass

import torch

from cafe.errors import CafeError, first_line

FIX = "reinstall the pair, e.g. pip install torch==2.13.0 torchvision==0.28.0"

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# torch forgets operators when the Library that declared them is collected.
_declared: list[torch.library.Library] = []


def ensure_torchvision() -> None:
    """Import torchvision; declare the two missing operators first where that fails without them.

    Changes nothing where torchvision works.

    Raises:
        CafeError: torchvision is missing or broken.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise CafeError(
            f"{error.name} is not installed, but image processors need it; {FIX}"
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


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Two builds that do not belong together: what they are, and the command that mends it."""

    what: str
    fix: str


def mismatch(torch_version: str, torchvision_version: str, torch_package: str) -> Mismatch | None:
    """A torch for CPUs only next to a torchvision for GPUs, or the reverse.

    The wrong one is torchvision: which torch is there decides where models run.

    Args:
        torch_version: `torch.__version__`, such as "2.13.0+cpu".
        torchvision_version: `torchvision.__version__`; the package's own metadata may lack the
            label after the plus sign.
        torch_package: The version of torch in its metadata, as pip knows it.

    Returns:
        None where the two fit, or where a version has no label.
    """
    labels = torch_version.partition("+")[2], torchvision_version.partition("+")[2]
    if not all(labels) or labels[0] == labels[1] or "cpu" not in labels:
        return None
    builds = [_build(label) for label in labels]
    label = torch_package.partition("+")[2]
    wanted = torchvision_version.partition("+")[0] + (f"+{label}" if label else "")
    index = ", with the --index-url that torch was installed from" if label else ""
    return Mismatch(
        f"torchvision {torchvision_version} is built for {builds[1]}, and torch {torch_version} "
        f"for {builds[0]}",
        f"reinstall torchvision to match torch: pip install --force-reinstall --no-deps "
        f"torchvision=={wanted}{index}",
    )


def _build(label: str) -> str:
    """What the label of a version says, in words."""
    if label == "cpu":
        return "CPUs only"
    cuda = re.fullmatch(r"cu(\d+)(\d)", label)
    return f"CUDA {cuda[1]}.{cuda[2]}" if cuda else label


def _declare() -> None:
    half_imported = [name for name in sys.modules if name.split(".")[0] == "torchvision"]
    for name in half_imported:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)


def _broken(error: Exception) -> CafeError:
    return CafeError(
        f"torchvision does not work with torch {torch.__version__} ({first_line(error)}); {FIX}"
    )
