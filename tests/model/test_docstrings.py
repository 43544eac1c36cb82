"""The examples in `CAFe`'s docstrings print what they say, with the bundled model."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from cafe.model.vlm import CAFe


@pytest.mark.parametrize(
    "method",
    [
        "from_pretrained",
        "save_pretrained",
        "encode",
        "generate",
        "write_captions",
        "score",
        "rerank",
        "similarity",
    ],
)
def test_an_example_prints_what_its_docstring_says(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    image = PIL.Image.new("RGB", (96, 96), "red")
    image.save("mug.png")
    names = {"np": np, "PIL": PIL, "Path": Path, "CAFe": CAFe, "image": image}
    model = CAFe.from_pretrained("tiny", device="cpu")
    finder = doctest.DocTestFinder(recurse=False)
    (examples,) = finder.find(getattr(CAFe, method), method, globs={**names, "model": model})
    assert examples.examples
    report: list[str] = []
    result = doctest.DocTestRunner().run(examples, out=report.append)
    assert result.failed == 0, "".join(report)
