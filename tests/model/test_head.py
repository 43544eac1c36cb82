"""The language head: all of it for given tokens, a few rows in full precision for yes and no."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor, nn

from cafe.model.head import token_log_probs, token_logits
from cafe.model.judging import _answer_ids, log_odds, yes_over_no
from cafe.model.rows.inputs import as_conversation
from cafe.model.rows.matching import match_question
from cafe.model.vlm import CAFe

COUNT, HIDDEN = 400, 64


class Rounded(nn.Linear):
    """Stands for a quantized head: its weight alone does not say what it computes."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, (self.weight * 4).round() / 4)


def with_adapter(head: nn.Linear, dora: bool) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=4, target_modules=["head"], use_dora=dora, lora_dropout=0.1)
    wrapped: Any = inject_adapter_in_model(config, nn.ModuleDict({"head": head}))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight)
            if "magnitude" in name:
                weight *= 1.5
    return wrapped.eval()["head"]


def with_head(model: CAFe, kind: str) -> CAFe:
    """A copy of the model with another head on it."""
    changed = deepcopy(model)
    inner, old = changed.model, changed.model.lm_head
    torch.manual_seed(3)
    match kind:
        case "tied":
            pass
        case "biased":
            old.bias = nn.Parameter(torch.randn(old.out_features))
        case "softcap":
            old.weight.data *= 4
            inner.config.get_text_config().final_logit_softcapping = 5.0
        case "lora" | "dora":
            inner.lm_head = with_adapter(old, kind == "dora")
        case "subclass":
            inner.lm_head = Rounded(old.in_features, old.out_features, bias=False)
    return changed


def full_logits(model: CAFe, states: Tensor) -> Tensor:
    """By the whole module, in the type of the states."""
    logits = model.lm_head(states)
    cap = model.logit_softcap
    return logits if cap is None else torch.tanh(logits / cap) * cap


def full_odds(model: CAFe, logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    yes, no = (p[:, _answer_ids(model, word)].sum(-1) for word in ("yes", "no"))
    return (yes / no).log()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["tied", "biased", "softcap", "lora", "dora", "subclass"])
@torch.inference_mode()
def test_odds_of_two_words_are_those_of_the_whole_softmax(
    babbling_model: CAFe, small_model: CAFe, kind: str, dtype: torch.dtype
):
    given = small_model if kind == "tied" else babbling_model
    model = with_head(given, kind).to(dtype)
    before = {name: weight.clone() for name, weight in model.lm_head.state_dict().items()}
    states = torch.randn(COUNT, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(1))
    found, want = yes_over_no(model)(states), full_odds(model, full_logits(model, states))
    exact = dtype == torch.float64 and kind != "subclass"  # whose float64 is rounded, as it was
    assert found.dtype == (dtype if exact else torch.float32)
    torch.testing.assert_close(found.double(), want.double(), rtol=0, atol=1e-12 if exact else 2e-5)
    after = model.lm_head.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


@pytest.mark.parametrize("kind", ["biased", "softcap", "lora", "dora"])
@torch.inference_mode()
def test_bfloat16_weights_do_not_round_the_odds(babbling_model: CAFe, kind: str):
    model = with_head(babbling_model, kind).to(torch.bfloat16)
    exact = deepcopy(model).double()
    states = 4 * torch.randn(COUNT, HIDDEN, generator=torch.Generator().manual_seed(1))
    states = states.to(torch.bfloat16)
    want = full_odds(exact, full_logits(exact, states.double()))
    found = yes_over_no(model)(states)
    by_module = full_odds(model, full_logits(model, states).float())
    assert (by_module - want).abs().max() > 0.01, "what the bfloat16 module would say"
    assert (found - want).abs().max() < 1e-4
    assert len(found.unique()) > 0.98 * COUNT


def test_a_bfloat16_model_tells_as_many_statements_apart_as_a_float32_one(
    babbling_model: CAFe, monkeypatch: pytest.MonkeyPatch
):
    """Rounded logits give many of them one and the same number."""
    image = as_conversation(PIL.Image.new("RGB", (96, 96), "red"))
    texts = [f"{a}{b} at the {c}" for a in "abcdefgh" for b in "ghijk" for c in ("top", "left")]
    questions = [match_question(image, as_conversation(text)) for text in texts]
    whole = deepcopy(babbling_model)
    whole.lm_head.weight.data *= 32  # a trained model's logits are far from 0, too
    half = deepcopy(whole).to(torch.bfloat16)

    def told_apart(model: CAFe) -> int:
        return len(log_odds(model, questions, 16).unique())

    assert told_apart(half) == told_apart(whole) == len(texts)
    monkeypatch.setattr("cafe.model.head._has_rows", lambda head: False)
    assert told_apart(whole) == len(texts)
    assert told_apart(half) < 0.8 * len(texts), "by the bfloat16 module"


@torch.inference_mode()
def test_only_the_rows_of_the_tokens_are_computed(babbling_model: CAFe):
    asked: list[int] = []
    model = deepcopy(babbling_model)
    model.lm_head.register_forward_hook(lambda *call: asked.append(call[2].shape[-1]))
    assert token_logits(model, torch.randn(3, HIDDEN), [5, 2, 7]).shape == (3, 3)
    assert asked == [3]


@pytest.mark.parametrize("kind", ["tied", "biased", "softcap"])
@torch.inference_mode()
def test_given_tokens_have_the_probabilities_of_the_whole_softmax(babbling_model: CAFe, kind: str):
    model = with_head(babbling_model, kind)
    states = torch.randn(COUNT, HIDDEN, generator=torch.Generator().manual_seed(2))
    logits = full_logits(model, states)
    tokens = torch.randint(logits.shape[1], (COUNT,), generator=torch.Generator().manual_seed(3))
    tokens[::2] = logits.argmax(-1)[::2]
    for at_once in (7, COUNT, 512):
        log_p, likeliest = token_log_probs(model, states, tokens, at_once)
        want = logits.log_softmax(-1)[torch.arange(COUNT), tokens]
        torch.testing.assert_close(log_p, want, rtol=0, atol=1e-5)
        assert torch.equal(likeliest, logits.argmax(-1) == tokens)
    assert [t.shape for t in token_log_probs(model, states[:0], tokens[:0])] == [(0,), (0,)]
