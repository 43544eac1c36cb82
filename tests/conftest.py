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

SMALL = {"vision_layers": 1, "vision_width": 64, "language_layers": 2, "language_width": 64}


def build_small_model(**sizes: Any) -> Any:
    """A random LLaVA-OneVision of about 0.2M parameters, in evaluation mode."""
    import torch

    from cafe.model.tiny import tiny_model, tiny_processor
    from cafe.model.vlm import CAFe

    torch.manual_seed(0)
    processor = tiny_processor(
        ["Describe this image.", "a big red cat at the top left", "yes no", "Compress this in one"],
        patch_pixels=16,  # a picture alone takes 78 tokens, beside others 37
    )
    return CAFe(tiny_model(processor, **{**SMALL, **sizes}), processor).eval()


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


def in_float64(model: Any) -> Any:
    """The model in float64 throughout: its RMS norms compute in float32 whatever they are given."""
    import types

    import torch

    def exact(norm: Any, hidden: Any) -> Any:
        return torch.nn.functional.rms_norm(
            hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon
        )

    model = model.double()
    norms = [m for m in model.modules() if hasattr(m, "variance_epsilon")]
    assert norms
    for norm in norms:
        norm.forward = types.MethodType(exact, norm)
    return model


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
