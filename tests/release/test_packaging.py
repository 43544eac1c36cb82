"""The wheel and the sdist hold what they should and nothing else; an installed wheel works."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import cafe
from cafe.data.scenes import write_scenes

ROOT = Path(__file__).parents[2]
SDIST = {
    *("src", "tests", "benchmarks", "scripts", "docs", "Makefile", "constraints.txt"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE"),
    *("pyproject.toml", "PKG-INFO", ".gitignore"),  # hatchling adds these
}


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel and an sdist of this tree."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def source_files() -> set[str]:
    """Files of the package that git knows or would add, relative to src."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src/cafe"]
    names = run(*command, cwd=ROOT).splitlines()
    return {x.removeprefix("src/") for x in names if (ROOT / x).is_file()}


@pytest.mark.slow
def test_the_wheel_is_the_package_and_its_metadata(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = {x for x in wheel.namelist() if ".dist-info/" not in x}
        metadata = next(x for x in wheel.namelist() if x.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(wheel.read(metadata).decode())
        entries = wheel.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert names == source_files()
    assert fields["Version"] == cafe.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert "cafe = cafe.cli:main" in entries


@pytest.mark.slow
def test_the_sdist_is_what_a_developer_needs(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = [Path(x).relative_to(Path(x).parts[0]) for x in archive.getnames()]
    assert {x.parts[0] for x in names if x.parts} == SDIST
    assert not [x for x in names if "__pycache__" in x.parts or x.suffix in {".pyc", ".log"}]


@pytest.mark.slow
def test_an_installed_wheel_trains_embeds_and_answers(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    """In an environment that has the dependencies, but of cafe the wheel only."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    options = {"cwd": tmp_path, "env": environment}
    assert run(python, "-c", "import cafe; print(cafe.__file__)", **options).startswith(str(site))

    write_scenes(tmp_path / "scenes", 8, seed=1)
    settings = [
        *("data.0.path=scenes/captions.json", "data.1.path=scenes/questions.json"),
        *("schedule.steps=1", "batch.examples=4", "output_dir=run"),
    ]
    recipe = site / "cafe" / "recipes" / "demo.yaml"
    run(python, "-m", "cafe", "train", recipe, *settings, **options)
    image = next((tmp_path / "scenes" / "images").iterdir())
    command = [python, "-m", "cafe", "generate", "run/model", "What is it?", "--image", image]
    assert run(*command, **options).strip()
