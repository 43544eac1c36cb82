"""What `from cafe import …` offers, and what it costs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import metadata

import pytest

import cafe
from cafe.model.vlm import CAFe
from cafe.types import Image


def test_every_name_is_there_and_is_that_of_its_home():
    assert cafe.__all__ == sorted(cafe.__all__)
    assert set(cafe.__all__) == set(cafe._HOMES) <= set(dir(cafe))
    for name in cafe.__all__:
        assert getattr(cafe, name).__name__ == name
    assert cafe.CAFe is CAFe
    assert cafe.Image is Image


def test_type_checkers_are_told_the_same_names():
    tree = ast.parse(inspect.getsource(cafe))
    told = {
        alias.name: node.module
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == cafe._HOMES


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'cafe' has no attribute 'Cafe'"):
        cafe.Cafe  # noqa: B018


def test_what_needs_no_torch_does_not_import_it():
    code = (
        "import sys; from cafe import CafeError, Image, keep_memory, load_recipe; "
        "assert load_recipe; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_version_is_the_packages():
    assert cafe.__version__ == metadata.version("cafe-vlm")
