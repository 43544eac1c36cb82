"""What many tests share: a small random model of the real class, and no network."""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path
from typing import Any

import pytest

from helpers.models import SMALL, build_small_model


@pytest.fixture(scope="session")
def small_model() -> Any:
    """Shared: tests that train must build their own (`build_small_model`)."""
    return build_small_model()


@pytest.fixture(scope="module")
def babbling_model(small_model: Any) -> Any:
    """Untied: it babbles, where a tied random model repeats its last token; so samples differ."""
    import torch

    from cafe.model.tiny import tiny_model
    from cafe.model.vlm import CAFe

    torch.manual_seed(2)
    inner = tiny_model(small_model.processor, **SMALL)
    inner.config.tie_word_embeddings = inner.config.text_config.tie_word_embeddings = False
    inner.lm_head.weight = torch.nn.Parameter(torch.randn_like(inner.lm_head.weight) / 4)
    return CAFe(inner, small_model.processor).eval()


@pytest.fixture(scope="session")
def small_dir(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as a saved checkpoint directory."""
    directory = tmp_path_factory.mktemp("small") / "model"
    small_model.save_pretrained(directory)
    return directory


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `cafe` with these arguments, in this process: (exit code, stdout, stderr)."""
    from cafe.cli import main

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cafe", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    monkeypatch.setenv("CAFE_DEBUG", "0")
    return run
