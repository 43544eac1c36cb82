"""The examples in the docstrings print what they say."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cafe.data.scenes.write import write_scenes
from cafe.retrieval import indexing, mining, search, thinking


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four scenes as `photos` and `captions.json`, in the current directory."""
    write_scenes(tmp_path / "scenes", 4, seed=0)
    (tmp_path / "scenes" / "images").rename(tmp_path / "photos")
    text = (tmp_path / "scenes" / "captions.json").read_text()
    (tmp_path / "captions.json").write_text(text.replace("images/", "photos/"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(function: Any, module: Any) -> None:
    (test,) = doctest.DocTestFinder(recurse=False).find(
        function, globs={**vars(module), function.__name__: function}
    )
    assert test.examples
    lines: list[str] = []
    report: Callable[[str], Any] = lines.append
    assert doctest.DocTestRunner().run(test, out=report).failed == 0, "".join(lines)


def test_an_index_is_built_and_searched(folder: Path) -> None:
    check(indexing.IndexReport, indexing)
    check(search.Searcher, search)


def test_the_facts_of_a_model_make_an_index(folder: Path) -> None:
    check(indexing.model_facts, indexing)


def test_negatives_are_mined(folder: Path) -> None:
    check(mining.mine_hard_negatives, mining)


def test_thoughts_are_written(folder: Path) -> None:
    check(thinking.write_thoughts, thinking)
