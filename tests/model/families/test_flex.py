"""FlexAttention: the states of SDPA, for every family; on a GPU its gradients too.

On a CPU it has no backward, and runs here as torch defines it, uncompiled; the mask, the positions
and transformers' way to it are those of a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from cafe.model.attention import OWN_FLEX, mask_of
from cafe.model.checkpoint.directory import kernels
from cafe.model.vlm import CAFe
from helpers import builders, plain
from helpers.family_examples import EXAMPLES


def uncompiled(query: Tensor, key: Tensor, value: Tensor, training: bool, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the missing compilation
        return flex_attention(query, key, value, **settings)


def takes_it(model: CAFe) -> bool:
    """Whether transformers' class says so; Qwen-VL's do not, and get it under a name of ours."""
    return bool(getattr(type(model.model), "_supports_flex_attn", False))


@contextmanager
def flexible(model: CAFe) -> Iterator[None]:
    model.model.set_attn_implementation(kernels("flex_attention", model.model.config))
    try:
        yield
    finally:
        model.model.set_attn_implementation(kernels("sdpa", model.model.config))


@pytest.mark.slow
def test_the_states_are_those_of_sdpa(family_model: CAFe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention", uncompiled
    )
    rows, expected, vision = plain.run(family_model, EXAMPLES)
    with flexible(family_model), torch.inference_mode():
        found = family_model(rows, vision)
    real = rows.subtree_end > torch.arange(found.shape[1]) + 1  # leaves padding out
    assert float((found - expected)[real].abs().max()) <= 1e-6


def test_it_is_for_the_language_model(family_dir: Path, family_model: CAFe) -> None:
    config = CAFe.from_pretrained(family_dir, device="cpu", attention="flex_attention").model.config
    name = "flex_attention" if takes_it(family_model) else OWN_FLEX
    assert config._attn_implementation == name
    assert config.get_text_config()._attn_implementation == name
    assert config.vision_config._attn_implementation == "sdpa"


def test_it_answers_as_sdpa_does_and_is_set_again(family_model: CAFe) -> None:
    expected = family_model.generate("Is it a cat?", max_new_tokens=4)
    with flexible(family_model):
        before = family_model.model.config._attn_implementation
        assert family_model.generate("Is it a cat?", max_new_tokens=4) == expected
        assert family_model.model.config._attn_implementation == before


def test_its_masks_do_not_grow_with_the_square_of_a_row(family_model: CAFe) -> None:
    """A mask for SDPA has a byte for each pair of tokens, a block mask a number for each block."""
    rows, _, _ = plain.run(family_model, EXAMPLES)
    longer = replace(
        rows,
        subtree_end=torch.full((1, 4096), 4096),
        input_ids=torch.zeros(1, 4096, dtype=torch.long),
        positions=torch.arange(4096)[None],
        visible_until=None,
        plain=False,
    )

    def stored(mask: Any) -> int:
        tensors = [mask] if isinstance(mask, Tensor) else vars(mask).values()
        return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))

    dense = stored(mask_of(longer, family_model.model, None))
    with flexible(family_model):
        sparse = stored(mask_of(longer, family_model.model, None))
    assert dense == 4096**2
    assert sparse < dense / 500


@pytest.mark.slow
def test_the_kernel_that_is_compiled_for_a_cpu_has_the_states(tmp_path: Path) -> None:
    directory = builders.build("gemma3", tmp_path / "gemma3")  # windows, and images that see
    model = CAFe.from_pretrained(directory, dtype=torch.float32, device="cpu")
    rows, expected, vision = plain.run(model, EXAMPLES[1:2])
    with flexible(model), torch.inference_mode():
        found = model(rows, vision)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", builders.NAMES)
def test_the_kernel_that_is_compiled_for_a_gpu_has_states_and_gradients(
    name: str, tmp_path: Path
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    sizes = builders.Sizes(width=128)  # heads of 64: the kernel's smallest are 16 wide
    directory = builders.build(name, tmp_path / name, sizes)
    model = CAFe.from_pretrained(directory, dtype=torch.float32, device="cuda")
    chunk = model.collator(EXAMPLES).to("cuda")
    found = {}
    for attention in ("sdpa", "flex_attention"):
        model.model.set_attn_implementation(kernels(attention, model.model.config))
        hidden = model(chunk.rows, chunk.vision)
        hidden.flatten(0, 1)[chunk.rows.pooled].square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        found[attention] = hidden.detach().flatten(0, 1)[chunk.rows.pooled], gradients
    (expected, wanted), (states, gradients) = found["sdpa"], found["flex_attention"]
    torch.testing.assert_close(states, expected, rtol=1e-2, atol=1e-2)  # TF32 within the kernel
    whole = float(torch.stack([g.norm() for g in wanted.values()]).norm())
    for parameter, gradient in wanted.items():
        assert float((gradients[parameter] - gradient).norm()) <= 2e-2 * whole, parameter
