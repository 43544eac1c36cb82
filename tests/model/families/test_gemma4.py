"""Gemma 4: what the published sizes combine differently, and what only this family has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cafe.model.vlm import CAFe
from helpers import builders, plain
from helpers.family_examples import EXACT, EXAMPLES
from helpers.models import in_float64

VARIANTS: dict[str, dict[str, Any]] = {
    "E2B": {
        "use_bidirectional_attention": None,
        "enable_moe_block": False,
        "attention_k_eq_v": False,
        "use_double_wide_mlp": True,
    },
    "31B": {
        "enable_moe_block": False,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
    "26B-A4B": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The name of a size, and a tiny model of its kind in float64."""
    directory = tmp_path_factory.mktemp("gemma4") / "model"
    builders.build("gemma4", directory, **VARIANTS[request.param])
    model = CAFe.from_pretrained(directory, dtype=torch.float64, device="cpu")
    return request.param, in_float64(model)


def test_every_size_has_the_states_of_the_plain_model(variant: tuple[str, CAFe]):
    name, model = variant
    assert model.family.bidirectional_image_attention == (name != "E2B")
    assert plain.worst_difference(model, EXAMPLES[:3]) <= EXACT


def test_images_that_saw_themselves_in_every_layer_would_be_noticed(
    variant: tuple[str, CAFe], monkeypatch: pytest.MonkeyPatch
):
    name, model = variant
    monkeypatch.setattr(type(model.family), "bidirectional_layers", None)
    assert (plain.worst_difference(model, EXAMPLES[1:2]) > 1e-4) == (name != "E2B")


def gradients(model: CAFe) -> dict[str, torch.Tensor]:
    chunk = model.collator(EXAMPLES[1:3])
    model(chunk.rows, chunk.vision).flatten(0, 1)[chunk.rows.pooled].square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_layers_that_share_keys_may_be_recomputed(tmp_path: Path):
    """The last layers take keys and values from earlier ones, which checkpointing runs twice."""
    directory = builders.build("gemma4", tmp_path / "model")
    model = in_float64(CAFe.from_pretrained(directory, dtype=torch.float64, device="cpu"))
    expected = gradients(model)
    model.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model.train())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9, msg=name)
    assert float(expected["model.model.language_model.layers.0.self_attn.k_proj.weight"].norm()) > 0
