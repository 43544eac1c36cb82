"""`cafe doctor` finds what is broken, says how to fix it, and exits with 1."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

import cafe.release.installation as installation
from cafe import precision
from cafe.cli import app
from cafe.errors import CheckpointError
from cafe.model import torchvision_pair


def run(*argv: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *argv])
    return result.exit_code, result.output


def test_this_installation_is_sound():
    code, output = run()
    assert code == 0, output
    assert "BROKEN" not in output
    for word in ("torch ", "transformers", "sentence-transformers", "device cpu", "bf16"):
        assert word in output
    assert "torchvision pair" in output


@pytest.mark.parametrize(
    ("installed", "reported"), [("4.0.0", "4.0.0, but cafe needs"), (None, "not installed")]
)
def test_a_wrong_version_is_reported_with_its_fix(monkeypatch, installed, reported):
    def version(name: str) -> str:
        if name != "transformers":
            return metadata_version(name)
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    metadata_version = metadata.version
    monkeypatch.setattr(installation.metadata, "version", version)
    code, output = run()
    assert code == 1
    assert reported in output
    assert "transformers: pip install 'transformers" in output


def test_a_check_that_cannot_run_is_broken_not_a_crash(monkeypatch):
    def devices():
        raise OSError("libcudart.so: cannot open\nmore")
        yield

    monkeypatch.setattr(installation, "devices", devices)
    code, output = run()
    assert code == 1
    assert "device: OSError: libcudart.so: cannot open; reinstall torch" in output


def test_the_contract_of_a_model_is_shown(monkeypatch):
    def contract(model: str):
        yield installation.Check("pooled token", f"<|im_end|> of {model}")

    monkeypatch.setattr(installation, "contract", contract)
    code, output = run("some/model")
    assert code == 0
    assert "<|im_end|> of some/model" in output


def test_a_model_that_does_not_load_is_reported(monkeypatch):
    def contract(model: str):
        raise CheckpointError("model 'x': no config.json in that directory")
        yield

    monkeypatch.setattr(installation, "contract", contract)
    code, output = run("x")
    assert code == 1
    assert "model: model 'x': no config.json" in output


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("instructions", "said"),
    [
        (
            {"avx2"},
            "AVX2: training in fp32; bf16 would be emulated, about 20 times slower than fp32",
        ),
        ({"avx2", "avx512_f"}, "AVX2, AVX-512: training in fp32; bf16 would be emulated, about"),
        ({"avx2", "avx512_f", "avx512_bf16"}, "AVX2, AVX-512, avx512_bf16: training in bf16\n"),
        (
            {"avx2", "avx512_f", "avx512_bf16", "amx_bf16"},
            "AVX2, AVX-512, avx512_bf16, AMX: training in bf16\n",
        ),
    ],
)
def test_a_cpus_instructions_and_what_follows(monkeypatch, instructions, said):
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(precision, "detected", lambda: frozenset(instructions))
    code, output = run()
    assert code == 0
    assert said in output


def test_a_variable_that_withholds_instructions_is_named(monkeypatch):
    monkeypatch.setattr(precision, "detected", lambda: frozenset({"avx2", "avx512_f"}))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert " cores, AVX2, limited by ONEDNN_MAX_CPU_ISA=AVX2: training in fp32" in run()[1]


def test_a_device_that_multiplies_wrongly_is_broken(monkeypatch):
    monkeypatch.setattr(torch, "ones", torch.zeros)
    code, output = run()
    assert code == 1
    assert "cpu: a matrix product in" in output
    assert "is wrong" in output


# ---------------------------------------------------------------------- the torchvision pair


def pair_of(monkeypatch, torch_version: str, package: str, torchvision_version: str):
    torchvision_pair.ensure_torchvision()
    import torchvision

    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torchvision, "__version__", torchvision_version)
    monkeypatch.setattr(
        installation, "_installed", lambda name: package if name == "torch" else None
    )


@pytest.mark.parametrize(
    ("versions", "declared", "said", "fix"),
    [
        (
            ("2.13.0+cpu", "2.13.0+cpu", "0.28.0+cu130"),
            True,
            "torchvision 0.28.0+cu130 is built for CUDA 13.0, and torch 2.13.0+cpu for CPUs only: "
            "plain transformers cannot import it; cafe can",
            "torchvision==0.28.0+cpu, with the --index-url that torch was installed from",
        ),
        (
            ("2.13.0+cu130", "2.13.0", "0.28.0+cpu"),
            False,
            "torchvision 0.28.0+cpu is built for CPUs only, and torch 2.13.0+cu130 for CUDA 13.0: "
            "its operators do not run on a GPU",
            "reinstall torchvision to match torch: pip install --force-reinstall --no-deps "
            "torchvision==0.28.0\n",
        ),
        (("2.13.0", "2.13.0", "0.28.0"), True, "no compiled operators", "reinstall the pair"),
    ],
)
def test_a_torchvision_of_another_build_is_a_warning(monkeypatch, versions, declared, said, fix):
    pair_of(monkeypatch, *versions)
    monkeypatch.setattr(torchvision_pair, "operators_declared", lambda: declared)
    monkeypatch.setattr(installation, "versions", lambda: [])
    code, output = run()
    assert code == 0, "cafe works all the same"
    assert f"WARN    torchvision pair  {said}" in output
    assert fix in output


def test_a_pair_of_one_build_works(monkeypatch):
    pair_of(monkeypatch, "2.13.0+cu130", "2.13.0", "0.28.0+cu130")
    monkeypatch.setattr(torchvision_pair, "operators_declared", lambda: False)
    monkeypatch.setattr(installation, "versions", lambda: [])
    code, output = run()
    assert code == 0
    assert "WARN" not in output
    assert "ok      torchvision pair  works" in output
