"""What a shell offers when it completes a command, and that it does not have to wait for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import cafe.recipes
from cafe.cli import completion
from cafe.evaluation.registry import TASKS

COMPLETE = """\
import os, sys
sys.argv = ["cafe"]
os.environ.update(_CAFE_COMPLETE="complete_bash", COMP_WORDS=sys.stdin.read(), COMP_CWORD="{at}")
from cafe.cli import main
try:
    main()
except SystemExit:
    pass
print("heavy:", *sorted({{"torch", "transformers", "numpy", "PIL", "yaml"}} & set(sys.modules)))
"""


def completed(line: str, folder: Path) -> list[str]:
    """What bash offers for the last word of a line; nothing heavy may be imported for it."""
    words = line.split(" ")
    done = subprocess.run(
        [sys.executable, "-c", COMPLETE.format(at=len(words) - 1)],
        input=line,
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
        check=False,
    )
    *offered, heavy = done.stdout.splitlines()
    assert (done.stderr, heavy) == ("", "heavy:")
    return [word.split(",")[-1] for word in offered]


def test_the_tasks_are_those_of_the_registry() -> None:
    assert tuple(TASKS) == completion.TASK_NAMES
    shipped = Path(cafe.recipes.__file__).parent.glob("*.yaml")
    assert completion.shipped_recipes() == sorted(path.name for path in shipped)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cafe eval", ["evaluate"]),
        ("cafe evaluate tiny --task scenes-p", ["scenes-pope", "scenes-pope-all"]),
        ("cafe evaluate tiny --suite q", ["quick"]),
        ("cafe train ca", ["caption.yaml"]),
        ("cafe train my", ["my.yaml", "mydata/"]),
        ("cafe embed mo", ["model/"]),
        ("cafe embed ti", ["tiny"]),
    ],
)
def test_a_shell_completes(tmp_path: Path, line: str, expected: list[str]) -> None:
    for name in ("mydata", "model", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "my.yaml").write_text("")
    (tmp_path / "my.txt").write_text("")
    assert completed(line, tmp_path) == expected


def test_paths_below_a_folder_are_completed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.yaml").write_text("")
    assert completion.recipes(f"{tmp_path}/a/r") == [f"{tmp_path}/a/run.yaml"]
    assert completion.recipes(f"{tmp_path}/nowhere/r") == []
