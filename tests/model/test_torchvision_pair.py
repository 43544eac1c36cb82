"""The torchvision pair: fixed where it breaks, untouched where it works, named when missing.

Each case runs in its own interpreter, because operators cannot be undeclared.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cafe.model.torchvision_pair import mismatch

CALL = """
from cafe.errors import CafeError
try:
    from cafe.model.torchvision_pair import ensure_torchvision, operators_declared
    ensure_torchvision()
    ensure_torchvision()
    import torchvision
    print("declared" if operators_declared() else "untouched")
except CafeError as error:
    print("error:", error)
"""

# What a broken pair does at import: registers a shape function of an operator that is not there.
BROKEN = """
import torch
@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold): ...
@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, iou_threshold): ...
"""


def run(code: str, packages: Path | None = None) -> str:
    environment = os.environ | ({"PYTHONPATH": str(packages)} if packages else {})
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fake_torchvision(folder: Path, content: str) -> Path:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(content)
    return folder


@pytest.mark.slow
def test_the_installed_torchvision_resizes_images():
    resize = (
        "import torch; from torchvision.transforms.v2 import functional as F\n"
        "print(tuple(F.resize(torch.ones(3, 8, 8), [4, 2]).shape))"
    )
    assert run(CALL + resize).splitlines()[-1] == "(3, 4, 2)"


@pytest.mark.slow
def test_transformers_builds_image_processors_afterwards():
    build = "from transformers import LlavaOnevisionVideoProcessor as V; print(type(V()).__name__)"
    assert run(CALL + build).splitlines()[-1] == "LlavaOnevisionVideoProcessor"


@pytest.mark.slow
def test_a_broken_pair_fails_without_the_declaration_and_imports_with_it(tmp_path: Path):
    packages = fake_torchvision(tmp_path, BROKEN)
    attempt = "try:\n    import torchvision\nexcept RuntimeError as error:\n    print(error)"
    assert "operator torchvision::nms does not exist" in run(attempt, packages)
    assert run(CALL, packages) == "declared"
    # Also after another import failed half-way.
    assert run(attempt + CALL, packages).splitlines()[-1] == "declared"


@pytest.mark.slow
def test_a_working_pair_is_left_alone(tmp_path: Path):
    assert run(CALL, fake_torchvision(tmp_path, "")) == "untouched"


@pytest.mark.slow
def test_a_missing_torchvision_names_the_mend():
    output = run("import sys; sys.modules['torchvision'] = None" + CALL)
    assert output.startswith("error: torchvision is not installed")
    assert "pip install torch==" in output


@pytest.mark.slow
def test_another_breakage_is_reported_in_one_line(tmp_path: Path):
    packages = fake_torchvision(tmp_path, "raise OSError('undefined symbol: x\\nmore')")
    output = run(CALL, packages)
    assert "(undefined symbol: x); reinstall the pair" in output
    assert "\n" not in output


@pytest.mark.parametrize(
    ("torch", "package", "torchvision", "wanted"),
    [
        ("2.13.0+cpu", "2.13.0+cpu", "0.28.0+cu130", "torchvision==0.28.0+cpu"),
        ("2.11.0+cu130", "2.11.0", "0.26.0+cpu", "torchvision==0.26.0"),
        ("2.11.0+cu128", "2.11.0+cu128", "0.26.0+cpu", "torchvision==0.26.0+cu128"),
        ("2.11.0+rocm6.4", "2.11.0+rocm6.4", "0.26.0+cpu", "torchvision==0.26.0+rocm6.4"),
        ("2.13.0+cpu", "2.13.0+cpu", "0.28.0+cpu", None),
        ("2.13.0+cu130", "2.13.0", "0.28.0+cu130", None),
        ("2.13.0", "2.13.0", "0.28.0", None),
        ("2.13.0+cpu", "2.13.0+cpu", "0.28.0", None),
        ("2.14.0a0+git1", "2.14.0a0+git1", "0.29.0a0+abc", None),
    ],
)
def test_a_build_for_cpus_and_one_for_gpus_do_not_fit(
    torch: str, package: str, torchvision: str, wanted: str | None
):
    found = mismatch(torch, torchvision, package)
    if wanted is None:
        assert found is None
        return
    assert found is not None
    assert found.what.startswith(f"torchvision {torchvision} is built for ")
    command = found.fix.partition("--no-deps ")[2].partition(",")[0]
    assert command == wanted
