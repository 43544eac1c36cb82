"""An embedding that is read by the cache of its thought is that of the whole text read anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cafe.model import inference
from cafe.model.captions import caption_request
from cafe.model.rows.inputs import as_messages
from cafe.model.thought_cache import readable, think_and_read
from cafe.model.thoughts import after_thoughts, read_after_own_thoughts
from cafe.model.vlm import CAFe
from helpers.builders import NAMES, build
from helpers.images import noise

WINDOWED = {"llava_onevision", "llava_next", "qwen2_vl", "gemma3", "gemma4"}
"""Of the tiny models; the published ones of these families, but for Gemma's, have no windows."""
STATEFUL = {"qwen3_5", "qwen3_5_moe", "lfm2_vl", "lfm3_vl"}
"""Whose cache has no state at the end of a shorter thought."""

TOKENS = 12
EXACT = 1e-10


def babbling(name: str, folder: Path) -> CAFe:
    """In float64. Untied and random, it says something else of every image."""
    build(name, folder)
    model = CAFe.from_pretrained(folder, device="cpu", dtype=torch.float64)
    scramble(model)
    if hasattr(model.model.config.get_text_config(), "num_experts"):
        model.model.set_experts_implementation("eager")  # the grouped product knows no float64
    return model


def scramble(model: CAFe) -> None:
    torch.manual_seed(0)
    head = model.model.lm_head
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight))


@pytest.fixture(scope="module")
def inputs() -> list[Any]:
    return as_messages([noise(1, 60, 60), noise(2, 90, 40), noise(3, 30, 80)])


def by_cache(model: CAFe, inputs: list[Any], prompt: str = "compress") -> tuple[list[str], Any]:
    requests = [request for one in inputs if (request := caption_request(one)) is not None]
    assert len(requests) == len(inputs)
    with torch.inference_mode():
        return think_and_read(model, inputs, requests, range(len(inputs)), TOKENS, prompt)


def read_anew(
    model: CAFe, inputs: list[Any], thoughts: list[str], prompt: str = "compress"
) -> list[torch.Tensor]:
    """Every text alone, with its image."""
    with torch.inference_mode():
        return [
            model.hidden_at(*model.collator.embedding_rows([one], prompt))[0]
            for one in after_thoughts(inputs, thoughts)
        ]


def worst(states: dict[int, torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max((state - expected[i]).abs().max().item() for i, state in states.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_continued_is_the_whole_text_read_anew(
    name: str, tmp_path: Path, inputs: list[Any]
) -> None:
    model = babbling(name, tmp_path / name)
    assert readable(model) == (name not in WINDOWED | STATEFUL)
    thoughts, states = by_cache(model, inputs)
    assert all(thoughts)
    assert len(set(thoughts)) > 1
    assert sorted(states) == [0, 1, 2], "none was read by the cache"
    difference = worst(states, read_anew(model, inputs, thoughts))
    if readable(model):
        assert difference < EXACT
        alone = [by_cache(model, [one]) for one in inputs]
        assert [said for (said,), _ in alone] == thoughts
        assert worst(states, [state[0] for _, state in alone]) < EXACT
    elif name != "qwen2_vl":  # whose window its SDPA does not apply
        assert difference > 1e-3, "this fallback is not needed, and the comparison cannot fail"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CAFe:
    return babbling("qwen3_vl", tmp_path_factory.mktemp("model") / "qwen3_vl")


def test_thoughts_that_are_tokenized_otherwise_than_they_were_generated(
    model: CAFe, inputs: list[Any]
) -> None:
    """A random model joins tokens as no tokenizer would: only the common beginning is taken."""
    with torch.inference_mode():
        asked = inference.generation_inputs(
            model, [request for one in inputs if (request := caption_request(one))], [0, 1, 2]
        )
        settings = inference.generation_settings(model, TOKENS, {})
        generated = model.generate_tokens(**asked, **settings)[:, asked["input_ids"].shape[1] :]
    thoughts, states = by_cache(model, inputs)
    again = [model.processor.tokenizer(said)["input_ids"] for said in thoughts]
    assert any(a != g.tolist()[: len(a)] for a, g in zip(again, generated, strict=True))
    assert worst(states, read_anew(model, inputs, thoughts)) < EXACT


def test_another_prompt_and_latent_tokens(tmp_path: Path, inputs: list[Any]) -> None:
    from cafe.model.latent import add_latent_tokens

    model = babbling("internvl", tmp_path / "m")
    thoughts, states = by_cache(model, inputs, "none")
    assert worst(states, read_anew(model, inputs, thoughts, "none")) < EXACT
    plain = states
    add_latent_tokens(model.model, model.processor, 3)
    model = CAFe(model.model, model.processor).eval()
    assert model.collator.latent
    scramble(model)
    thoughts, states = by_cache(model, inputs)
    assert worst(states, read_anew(model, inputs, thoughts)) < EXACT
    assert worst(states, [plain[i] for i in range(3)]) > 1e-3


def test_the_mean_of_latent_tokens(tmp_path: Path, inputs: list[Any]) -> None:
    from cafe.model.latent import add_latent_tokens

    model = babbling("internvl", tmp_path / "m")
    add_latent_tokens(model.model, model.processor, 3, "mean")
    model = CAFe(model.model, model.processor).eval()
    assert model.collator.averages == 3
    scramble(model)
    thoughts, states = by_cache(model, inputs)
    assert worst(states, read_anew(model, inputs, thoughts)) < EXACT
    model.collator = replace(model.collator, averages=0)
    _, last = by_cache(model, inputs)
    assert worst(last, [states[i] for i in range(3)]) > 1e-3, "the mean is another embedding"


def test_what_has_no_room_or_no_thought_is_read_anew(model: CAFe, inputs: list[Any]) -> None:
    mixed = [*inputs, *as_messages(["a cat", {"text": "b", "image": noise(4, 40, 40)}])]
    collator = model.collator
    vectors, thoughts = read_after_own_thoughts(model, mixed, TOKENS, 2, "compress")
    assert [said is None for said in thoughts] == [False, False, False, True, True]
    expected = read_anew(model, mixed, thoughts)  # type: ignore[arg-type]
    torch.testing.assert_close(vectors, torch.stack(expected).float(), atol=1e-5, rtol=1e-5)
    longest = max(
        model.collator.embedding_rows([one])[0].tokens for one in after_thoughts(mixed, thoughts)
    )
    try:
        model.collator = replace(collator, max_tokens=longest - 2)  # the longest thought is cut
        _, states = by_cache(model, inputs)
        assert len(states) < 3
        vectors, again = read_after_own_thoughts(model, inputs, TOKENS, 2, "compress")
        assert again == thoughts[:3]
        expected = read_anew(model, inputs, again)  # type: ignore[arg-type]
        torch.testing.assert_close(vectors, torch.stack(expected).float(), atol=1e-5, rtol=1e-5)
    finally:
        model.collator = collator


def test_progress_counts_every_input_once(model: CAFe, inputs: list[Any]) -> None:
    mixed = [*inputs, *as_messages(["a cat"])]
    counts: list[int] = []
    read_after_own_thoughts(model, mixed, TOKENS, 2, "compress", on_progress=counts.append)
    assert sum(counts) == 4


def test_beams_and_other_kernels_are_read_anew(model: CAFe) -> None:
    config = model.model.generation_config
    config.num_beams = 2
    assert not readable(model)
    config.num_beams = 1
    assert readable(model)
