"""Which number format a device multiplies matrices in: `precision: auto`, resolved.

bfloat16 is faster than float32 only where a device has instructions for it. A CPU without them
emulates each product, and a training step takes about 20 times as long as in float32. So `auto` is
bf16 where the instructions are there and may be used, else fp32.

Instructions are named as `torch.cpu.get_capabilities` names them.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Literal

import torch

ComputePrecision = Literal["fp32", "bf16"]

INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512_f": "AVX-512",
    "avx512_bf16": "avx512_bf16",
    "amx_bf16": "AMX",
    "bf16": "bf16",
}
"""What decides the speed of a matrix product, slowest first, with its usual name. The last is that
of ARM CPUs; it also stands for a GPU that computes in bfloat16."""

SLOWER = "about 20 times slower than fp32"
"""What emulated bfloat16 costs."""

_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_CPUINFO = Path("/proc/cpuinfo")
_CPUINFO_NAMES = {"avx512f": "avx512_f"}  # the other names are equal

_log = logging.getLogger(__name__)


# ---------------------------------------------------------------------- choose


def precision_of(device_type: str, instructions: Collection[str]) -> ComputePrecision:
    """What `auto` means on a device with these instructions.

    Args:
        device_type: "cpu", "cuda", …; other devices than these two get fp32.
        instructions: Keys of `INSTRUCTIONS`.
    """
    native = device_type in ("cpu", "cuda") and not _BF16.isdisjoint(instructions)
    return "bf16" if native else "fp32"


def resolved_precision(
    asked: Literal["auto", "bf16", "fp32"], device: torch.device | str
) -> ComputePrecision:
    """The precision that a setting means on a device of this machine."""
    if asked != "auto":
        return asked
    device = torch.device(device)
    return precision_of(device.type, instructions_of(device))


def emulation_warning(device: torch.device | str, instead: str) -> str | None:
    """The warning for bf16 that was asked for on a CPU that emulates it; None elsewhere.

    Args:
        device: Where the model computes.
        instead: What to do, the end of the sentence.
    """
    if torch.device(device).type != "cpu" or resolved_precision("auto", device) == "bf16":
        return None
    return f"warning: this CPU only emulates bf16 ({described()}), {SLOWER}; {instead}"


@cache
def warn_if_emulated(device: torch.device) -> None:
    """Log the warning for a model in bf16 on this device, once in a process."""
    if (warning := emulation_warning(device, "use float32")) is not None:
        _log.warning("%s", warning)


# ---------------------------------------------------------------------- what there is


def instructions_of(device: torch.device) -> frozenset[str]:
    """The instructions that a device of this machine may use, as keys of `INSTRUCTIONS`."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return frozenset({"bf16"}) if native else frozenset()
    if device.type != "cpu":
        return frozenset()
    usable = allowed(detected(), os.environ)
    return usable if torch.backends.mkldnn.is_available() else usable - _BF16


def described() -> str:
    """The instructions that this CPU may use, and which variables withhold others, in words."""
    usable = instructions_of(torch.device("cpu"))
    names = ", ".join(name for key, name in INSTRUCTIONS.items() if key in usable)
    limits = [f"{key}={os.environ[key]}" for key in _VARIABLES if key in os.environ]
    limited = f", limited by {' and '.join(limits)}" if usable != detected() and limits else ""
    return (names or platform.machine()) + limited


def detected() -> frozenset[str]:
    """The instructions that this CPU has, whether or not they may be used.

    From torch where it knows them, else from Linux. Neither: none are known.
    """
    known = getattr(torch.cpu, "get_capabilities", None)  # not in every supported torch
    if known is not None:
        found = {name for name, value in known().items() if value is True}
    elif _CPUINFO.is_file():
        found = flags(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    else:
        found = set()
    return frozenset(found & INSTRUCTIONS.keys())


def flags(cpuinfo: str) -> set[str]:
    """The instructions in the text of /proc/cpuinfo, with torch's names."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    words = [rest.split() for key, _, rest in lines if key.strip() in ("flags", "Features")]
    return {_CPUINFO_NAMES.get(word, word) for word in (words[0] if words else ())}


# ---------------------------------------------------------------------- what may be used

_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_X86 = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")


def allowed(instructions: Collection[str], environment: Mapping[str, str]) -> frozenset[str]:
    """The instructions that torch and oneDNN use under these environment variables.

    ATEN_CPU_CAPABILITY limits torch's own kernels, ONEDNN_MAX_CPU_ISA (or DNNL_MAX_CPU_ISA, its
    older name) oneDNN's matrix products. The lower of the two counts.
    """
    aten = environment.get("ATEN_CPU_CAPABILITY", "")
    onednn = environment.get("ONEDNN_MAX_CPU_ISA", environment.get("DNNL_MAX_CPU_ISA", ""))
    levels = min(_aten_levels(aten), _onednn_levels(onednn.lower()))
    withheld = {*_X86[levels:]} | ({"bf16"} if aten == "default" else set())
    return frozenset(instructions) - withheld


def _aten_levels(value: str) -> int:
    """The number of `_X86` that remain. torch ignores values that it does not know."""
    return {"default": 0, "avx2": 1}.get(value, len(_X86))


def _onednn_levels(value: str) -> int:
    """As `_aten_levels`. A value of oneDNN names the newest instructions that it may use."""
    if "amx" in value:
        return 4
    if value.startswith("avx10") or value.endswith(("_bf16", "_fp16")):
        return 3
    if value.startswith("avx512_core"):
        return 2
    if value.startswith("avx2"):
        return 1
    return 0 if value in ("sse41", "avx") else len(_X86)
