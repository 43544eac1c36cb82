"""`cafe doctor` finds what is broken, says the mend, and exits with 1."""

from __future__ import annotations

from importlib import metadata

import pytest
from typer.testing import CliRunner

import cafe.cli.doctor as doctor
from cafe.cli import app
from cafe.errors import CheckpointError


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
    ("installed", "told"), [("4.0.0", "4.0.0, but cafe needs"), (None, "not installed")]
)
def test_a_wrong_version_is_told_with_its_mend(monkeypatch, installed, told):
    def version(name: str) -> str:
        if name != "transformers":
            return metadata_version(name)
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    metadata_version = metadata.version
    monkeypatch.setattr(doctor.metadata, "version", version)
    code, output = run()
    assert code == 1
    assert told in output
    assert "transformers: pip install 'transformers" in output


def test_a_check_that_cannot_run_is_broken_not_a_crash(monkeypatch):
    def devices():
        raise OSError("libcudart.so: cannot open\nmore")
        yield

    monkeypatch.setattr(doctor, "devices", devices)
    code, output = run()
    assert code == 1
    assert "device: OSError: libcudart.so: cannot open; reinstall torch" in output


def test_the_contract_of_a_model_is_shown(monkeypatch):
    def contract(model: str):
        yield doctor.Check("pooled token", f"<|im_end|> of {model}")

    monkeypatch.setattr(doctor, "contract", contract)
    code, output = run("some/model")
    assert code == 0
    assert "<|im_end|> of some/model" in output


def test_a_model_that_does_not_load_is_told(monkeypatch):
    def contract(model: str):
        raise CheckpointError("model 'x': no config.json in that directory")
        yield

    monkeypatch.setattr(doctor, "contract", contract)
    code, output = run("x")
    assert code == 1
    assert "model: model 'x': no config.json" in output
