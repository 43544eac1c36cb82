"""`precision: auto`: bf16 where a device has instructions for it and may use them, else fp32."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from cafe import precision
from cafe.evaluation.model_calls import ModelCalls
from cafe.model.vlm import CAFe
from cafe.precision import (
    allowed,
    detected,
    emulation_warning,
    flags,
    precision_of,
    resolved_precision,
    warn_if_emulated,
)

ZEN_3 = frozenset({"avx2"})
ICE_LAKE = frozenset({"avx2", "avx512_f"})
ZEN_4 = frozenset({"avx2", "avx512_f", "avx512_bf16"})
SAPPHIRE_RAPIDS = frozenset({"avx2", "avx512_f", "avx512_bf16", "amx_bf16"})
NEOVERSE_V1 = frozenset({"bf16"})


@pytest.fixture
def old_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(precision, "detected", lambda: ZEN_3)
    warn_if_emulated.cache_clear()


@pytest.mark.parametrize(
    ("device", "instructions", "expected"),
    [
        ("cpu", frozenset(), "fp32"),
        ("cpu", ZEN_3, "fp32"),
        ("cpu", ICE_LAKE, "fp32"),
        ("cpu", ZEN_4, "bf16"),
        ("cpu", SAPPHIRE_RAPIDS, "bf16"),
        ("cpu", {"avx2", "amx_bf16"}, "bf16"),
        ("cpu", NEOVERSE_V1, "bf16"),
        ("cuda", {"bf16"}, "bf16"),
        ("cuda", frozenset(), "fp32"),
        ("mps", {"bf16"}, "fp32"),
        ("xpu", {"bf16"}, "fp32"),
    ],
)
def test_auto_by_device_and_instructions(device: str, instructions: Any, expected: str):
    assert precision_of(device, instructions) == expected


@pytest.mark.parametrize(
    ("environment", "left"),
    [
        ({}, SAPPHIRE_RAPIDS),
        ({"ATEN_CPU_CAPABILITY": "avx512"}, SAPPHIRE_RAPIDS),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, ZEN_3),
        ({"ATEN_CPU_CAPABILITY": "default"}, frozenset()),
        ({"ATEN_CPU_CAPABILITY": "AVX2"}, SAPPHIRE_RAPIDS),  # torch ignores it, with a warning
        ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, frozenset()),
        ({"ONEDNN_MAX_CPU_ISA": "AVX"}, frozenset()),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, ZEN_3),
        ({"ONEDNN_MAX_CPU_ISA": "avx2_vnni_2"}, ZEN_3),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, ICE_LAKE),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, ICE_LAKE),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, ZEN_4),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"}, ZEN_4),
        ({"ONEDNN_MAX_CPU_ISA": "AVX10_1_512"}, ZEN_4),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, SAPPHIRE_RAPIDS),
        ({"ONEDNN_MAX_CPU_ISA": "AVX10_1_512_AMX_FP16"}, SAPPHIRE_RAPIDS),
        ({"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, SAPPHIRE_RAPIDS),
        ({"DNNL_MAX_CPU_ISA": "AVX2"}, ZEN_3),
        ({"DNNL_MAX_CPU_ISA": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, SAPPHIRE_RAPIDS),
        ({"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, ICE_LAKE),
        ({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, ZEN_3),
    ],
)
def test_what_the_environment_leaves_of_an_x86_cpu(environment: Any, left: frozenset[str]):
    assert allowed(SAPPHIRE_RAPIDS, environment) == left


def test_x86_names_mean_nothing_to_an_arm_cpu_and_default_does():
    assert allowed(NEOVERSE_V1, {"ONEDNN_MAX_CPU_ISA": "SVE_128"}) == NEOVERSE_V1
    assert allowed(NEOVERSE_V1, {"ATEN_CPU_CAPABILITY": "default"}) == frozenset()


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n\nflags\t: x", "bf16"),
        ("processor : 0\nflags : fpu avx2 avx512f avx512bw\nbugs : amx_bf16\n", "fp32"),
        ("processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\n", "bf16"),
        ("processor\t: 0\nFeatures\t: fp asimd\n", "fp32"),
        ("", "fp32"),
    ],
)
def test_instructions_are_read_from_linux_where_torch_does_not_know_them(
    cpuinfo: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "cpuinfo"
    file.write_text(cpuinfo)
    monkeypatch.setattr(precision, "_CPUINFO", file)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert precision_of("cpu", detected()) == expected
    file.unlink()
    assert detected() == frozenset()


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="no Linux")
@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="an older torch")
def test_linux_and_torch_agree_about_this_cpu():
    found = flags(Path("/proc/cpuinfo").read_text()) & precision.INSTRUCTIONS.keys()
    assert found == detected()


def test_what_is_asked_for_is_what_one_gets(old_cpu: None):
    assert [resolved_precision(p, "cpu") for p in ("auto", "bf16", "fp32")] == [
        *("fp32", "bf16", "fp32")
    ]


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_is_asked_without_emulation(
    native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
):
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    assert resolved_precision("auto", "cuda") == expected


def test_a_torch_without_onednn_uses_no_bf16_instructions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "detected", lambda: NEOVERSE_V1)
    assert resolved_precision("auto", "cpu") == "bf16"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert resolved_precision("auto", "cpu") == "fp32"


@pytest.mark.slow
@pytest.mark.skipif(not detected() & {"avx512_bf16", "amx_bf16"}, reason="a CPU without bf16")
@pytest.mark.parametrize(
    ("limits", "described"),
    [
        (
            {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
            "fp32 False AVX2, limited by ATEN_CPU_CAPABILITY=avx2 and ONEDNN_MAX_CPU_ISA=AVX2",
        ),
        ({}, "bf16 True AVX2, AVX-512, avx512_bf16"),
    ],
)
def test_a_limited_process_computes_as_auto_says(limits: dict[str, str], described: str):
    """The second word is oneDNN's own answer."""
    code = (
        "import torch; from cafe.precision import described, resolved_precision as r\n"
        "onednn = torch.ops.mkldnn._is_mkldnn_bf16_supported()\n"
        "print(r('auto', 'cpu'), onednn, described())"
    )
    names = {"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"}
    plain = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=plain | limits
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().removesuffix(", AMX") == described


# ---------------------------------------------------------------------- the warning


def test_emulation_is_named_with_its_cost_on_a_cpu_only(
    old_cpu: None, monkeypatch: pytest.MonkeyPatch
):
    assert emulation_warning("cpu", "set precision: auto") == (
        "warning: this CPU only emulates bf16 (AVX2), about 20 times slower than fp32; "
        "set precision: auto"
    )
    assert emulation_warning("mps", "") is None
    monkeypatch.setattr(precision, "detected", lambda: ZEN_4)
    assert emulation_warning("cpu", "") is None


def test_a_model_in_bf16_that_would_be_emulated_is_said_once(
    old_cpu: None, small_dir: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING, "cafe"):
        CAFe.from_pretrained(small_dir, device="cpu")
        assert caplog.messages == []
        model = CAFe.from_pretrained(small_dir, dtype=torch.bfloat16, device="cpu")
        calls = ModelCalls(model, precision="bf16").with_prompt("compress")
    (message,) = caplog.messages
    assert calls.precision == "bf16"
    assert "only emulates bf16 (AVX2), about 20 times slower than fp32; use float32" in message


def test_evaluation_is_in_fp32_whatever_the_cpu_has(small_model: CAFe):
    """A published number must not depend on the instructions of the machine."""
    assert ModelCalls(small_model).precision == "fp32"
