"""A model with FlexAttention generates with SDPA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from cafe.model.attention import SdpaWhileGenerating
from cafe.model.vlm import CAFe

ASKED: list[Any] = ["yes", {"text": "What is it?", "image": PIL.Image.new("RGB", (96, 96), "red")}]


@pytest.fixture(scope="module")
def flexible(small_dir: Path) -> CAFe:
    return CAFe.from_pretrained(small_dir, device="cpu", attention="flex_attention")


def kernels(model: CAFe) -> list[str]:
    config = model.model.config
    parts = (config, config.text_config, config.vision_config)
    return [part._attn_implementation for part in parts]


def test_it_answers_as_sdpa_does_and_reads_with_flex_afterwards(flexible: CAFe, small_model: CAFe):
    before = kernels(flexible)
    assert before[:2] == ["flex_attention", "flex_attention"]
    want = small_model.generate(ASKED, max_new_tokens=6)
    assert flexible.generate(ASKED, max_new_tokens=6) == want
    assert kernels(flexible) == before
    assert "".join(flexible.generate(ASKED[0], max_new_tokens=6, stream=True)) == want[0]
    assert kernels(flexible) == before


def test_the_last_of_several_that_generate_restores_flex(flexible: CAFe):
    before = kernels(flexible)
    sdpa = SdpaWhileGenerating(flexible.model.config)
    with sdpa:
        assert kernels(flexible) == ["sdpa", "sdpa", before[2]]
        with sdpa:
            pass
        assert kernels(flexible)[0] == "sdpa", "the other still generates"
    assert kernels(flexible) == before


def test_an_error_in_generation_restores_flex_too(flexible: CAFe):
    before = kernels(flexible)
    with pytest.raises(ValueError, match="no_such_setting"):
        flexible.generate("hi", no_such_setting=1)
    assert kernels(flexible) == before


def test_other_kernels_stay_as_they_are(small_model: CAFe):
    before = kernels(small_model)
    with SdpaWhileGenerating(small_model.model.config):
        assert kernels(small_model) == before
    assert kernels(small_model) == before
