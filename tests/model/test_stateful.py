"""Rows that branch in layers that carry a state: each sequence as if it were alone.

The slow twins are the definitions: a sequence's own tokens, one after the other.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from cafe.errors import FamilyError
from cafe.model import hidden
from cafe.model.attention import layer_windows
from cafe.model.rows.rows import Rows
from cafe.model.rows.segments import Segments
from cafe.model.rows.trie import Row, TokenSequence, build_row, pack_rows, stack_rows
from cafe.model.stateful import (
    CHUNK,
    allow_branches,
    branching_convolution,
    branching_rule,
    gated_delta_rule,
)
from cafe.model.vlm import CAFe
from helpers import builders
from helpers.models import in_float64, recurrence

EXACT = 1e-10
KERNEL = 4


def token_lists(*lists: list[int]) -> list[TokenSequence]:
    return [TokenSequence.from_text(tokens) for tokens in lists]


def branching(lengths: list[int], seed: int = 0) -> list[TokenSequence]:
    """Sequences whose trie has a run of each length, one below the other, and leaves beside."""
    rng = np.random.default_rng(seed)
    prefix: list[int] = []
    found = []
    for number, length in enumerate(lengths):
        prefix = [*prefix, number, *rng.integers(20, 60, length - 1).tolist()]
        found.append([*prefix, 100 + number, *rng.integers(20, 60, number).tolist()])
    return token_lists(*found, prefix)


CASES = {
    "segments of 1, 3, 63, 64, 65 tokens": [branching([1, 3, 63, 64, 65])],
    "two short ones in a row in one window": [branching([5, 1, 1, 2])],
    "no prefix at all": [token_lists([1, 2, 3], [4, 5])],
    "one is the beginning of another": [token_lists([1, 2], [1, 2, 3, 4], [1, 2, 5])],
    "several rows": [branching([70, 2]), branching([3, 90], 1), token_lists([7])],
}


def flat_indices(rows: list[Row], length: int) -> list[Tensor]:
    """Where the tokens of each sequence are, in row order."""
    return [
        torch.from_numpy(number * length + indices)
        for number, row in enumerate(rows)
        for indices in row.token_indices
    ]


def built(groups: list[list[TokenSequence]], pack: int = 0) -> tuple[Any, list[Tensor], Segments]:
    rows = [build_row(group) for group in groups]
    rows = pack_rows(rows, pack) if pack else rows
    batch = stack_rows(rows, 0)
    return (
        batch,
        flat_indices(rows, batch.input_ids.shape[1]),
        Segments.of(batch.subtree_end),
    )


def random_inputs(rows: int, length: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {
        "query": torch.randn(rows, length, 2, 6),
        "key": torch.randn(rows, length, 2, 6),
        "value": torch.randn(rows, length, 4, 5),
        "g": -torch.rand(rows, length, 4),
        "beta": torch.rand(rows, length, 4),
    }
    return {name: value.double().requires_grad_() for name, value in made.items()}


# ------------------------------------------------------------------ segments


@settings(max_examples=100, deadline=None)
@given(
    groups=st.lists(
        st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    ),
    pack=st.sampled_from([0, 20]),
)
def test_every_token_is_in_one_segment_and_knows_the_one_before_it(
    groups: list[list[list[int]]], pack: int
):
    batch, sequences, segments = built([token_lists(*group) for group in groups], pack)
    count = batch.input_ids.numel()
    for indices in sequences:
        before = [count, *indices[:-1].tolist()]
        assert segments.before[indices].tolist() == before
    taken = torch.cat([b.tokens[b.real] for b in segments.batches])
    assert sorted(taken.tolist()) == list(range(count))
    ends: list[int] = []  # the last token of each segment whose state is kept
    for one in segments.batches:
        first = segments.before[one.tokens[:, 0]].tolist()
        parents = [count] * len(first) if one.parents is None else one.parents.tolist()
        if one.parents is not None:
            parents = [ends[parent] for parent in parents]
        assert first == parents
        last = one.tokens.gather(1, one.real.sum(1, keepdim=True) - 1)[:, 0]
        ends += last.tolist() if one.keeps else []


def test_segments_of_one_depth_are_few_batches():
    """A batch of prefixes with two branches each is two calls of a kernel, or three."""
    _, _, segments = built([branching([40, 3], seed) for seed in range(8)])
    assert len(segments.batches) <= 4
    assert max(len(batch.tokens) for batch in segments.batches) >= 8


# ------------------------------------------------------------------ the two functions


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_chunks_compute_the_recurrence(length: int):
    inputs = random_inputs(2, length)
    state = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    expected = recurrence(**inputs, initial_state=state, use_qk_l2norm_in_kernel=True)
    g = inputs.pop("g")
    found = gated_delta_rule(**inputs, log_decay=g, state=state, normalise=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT)


def test_in_lower_precision_it_is_what_transformers_computes():
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

    inputs = {name: value.detach().float() for name, value in random_inputs(2, 100).items()}
    settings = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    expected = qwen.torch_chunk_gated_delta_rule(**inputs, **settings)
    g = inputs.pop("g")
    with torch.autocast("cpu", torch.bfloat16):
        found = gated_delta_rule(**inputs, log_decay=g, normalise=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def by_calls_of_packed_sequences(
    query: Tensor, *rest: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor, **named: Any
) -> tuple[Tensor, Tensor]:
    """What flash-linear-attention's `chunk_gated_delta_rule` computes, one sequence at a time."""
    outputs, states = [], []
    settings = {"use_qk_l2norm_in_kernel": named.pop("use_qk_l2norm_in_kernel")}
    assert named.pop("output_final_state")
    for number, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):
        start = None if initial_state is None else initial_state[number : number + 1]
        parts = [x[:, begin:end] for x in (query, *rest)]
        gates = {name: x[:, begin:end] for name, x in named.items()}
        output, state = recurrence(*parts, **gates, initial_state=start, **settings)
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states)


@pytest.mark.parametrize("fused", [None, by_calls_of_packed_sequences])
@pytest.mark.parametrize("case", CASES)
def test_the_rule_on_a_trie_is_that_of_each_sequence_alone(case: str, fused: Any):
    batch, sequences, segments = built(CASES[case])
    inputs = random_inputs(*batch.input_ids.shape)
    found = branching_rule(
        **inputs, segments=segments, use_qk_l2norm_in_kernel=True, fused=fused
    ).flatten(0, 1)
    torch.manual_seed(1)
    weights = torch.randn_like(found)
    loss, expected_loss = torch.zeros(()), torch.zeros(())
    for indices in sequences:
        own = {name: x.flatten(0, 1)[indices][None] for name, x in inputs.items()}
        expected, _ = recurrence(**own, use_qk_l2norm_in_kernel=True)
        torch.testing.assert_close(found[indices], expected[0], rtol=0, atol=EXACT)
        loss = loss + (found[indices] * weights[indices]).sum()
        expected_loss = expected_loss + (expected[0] * weights[indices]).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    for a, b in zip(
        gradients, torch.autograd.grad(expected_loss, list(inputs.values())), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT)


@pytest.mark.parametrize("case", CASES)
def test_the_convolution_on_a_trie_is_that_of_each_sequence_alone(case: str):
    batch, sequences, segments = built(CASES[case])
    rows, length = batch.input_ids.shape
    torch.manual_seed(0)
    inputs = torch.randn(rows, 7, length, dtype=torch.float64)
    weight, bias = torch.randn(7, KERNEL).double(), torch.randn(7).double()
    found = branching_convolution(inputs, weight, bias, "silu", segments)
    tokens = inputs.transpose(1, 2).flatten(0, 1)
    for indices in sequences:
        own = functional.pad(tokens[indices].T[None], (KERNEL - 1, 0))
        expected = functional.silu(functional.conv1d(own, weight[:, None], bias, groups=7))
        torch.testing.assert_close(
            found.transpose(1, 2).flatten(0, 1)[indices].T, expected[0], rtol=0, atol=EXACT
        )


# ------------------------------------------------------------------ the language model


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_5_moe", "lfm2_vl", "lfm3_vl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CAFe:
    directory = builders.build(request.param, tmp_path_factory.mktemp("model") / "model")
    return in_float64(CAFe.from_pretrained(directory, dtype=torch.float64, device="cpu"))


@pytest.fixture
def all_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers ask for float32 in a few places."""
    as_float32 = torch.Tensor.float
    monkeypatch.setattr(
        torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else as_float32(x)
    )


def rows_of(
    model: CAFe, groups: list[list[TokenSequence]], *, plain: bool
) -> tuple[Rows, list[Tensor]]:
    batch, sequences, _ = built(groups)
    nothing = torch.zeros(0, dtype=torch.long)
    positions = batch.positions
    if model.family.model_type.startswith("qwen"):
        positions = positions.expand(4, *positions.shape)
    ends = batch.subtree_end
    return Rows(
        batch.input_ids, positions, ends, nothing, nothing, nothing, nothing, plain=plain
    ), sequences


def states_and_gradients(
    model: CAFe, groups: list[list[TokenSequence]], *, plain: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Of each sequence; the loss weighs every state by its token and its index."""
    rows, sequences = rows_of(model, groups, plain=plain)
    states = model(rows, {}).flatten(0, 1)
    found, loss = [], torch.zeros(())
    for indices in sequences:
        own = states[indices]
        found.append(own.detach())
        steps = torch.arange(len(own), dtype=torch.float64) + 1
        loss = loss + (own.cumsum(1).sin().sum(1) * steps).sum() / len(steps)
    model.zero_grad(set_to_none=True)
    loss.backward()
    return found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_states_and_gradients_of_tries_are_those_of_separate_passes(
    model: CAFe, case: str, checkpointing: bool
):
    groups = CASES[case]
    expected, own = states_and_gradients(model, [[s] for g in groups for s in g], plain=True)
    if checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    try:
        found, shared = states_and_gradients(model, groups, plain=False)
    finally:
        model.model.gradient_checkpointing_disable()
        model.eval()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=EXACT)
    assert shared.keys() == own.keys()
    assert any("linear_attn.A_log" in name or "conv.conv.weight" in name for name in own)
    # A router's softmax is float32 whatever the model is.
    exact = 1e-6 if "moe" in model.family.model_type else EXACT
    for name, gradient in own.items():
        scale = float(gradient.abs().max()) + 1
        torch.testing.assert_close(shared[name], gradient, rtol=0, atol=exact * scale, msg=name)


def test_a_mask_alone_would_not_keep_branches_apart(model: CAFe, monkeypatch: pytest.MonkeyPatch):
    groups = CASES["two short ones in a row in one window"]
    expected, _ = states_and_gradients(model, [[s] for g in groups for s in g], plain=True)
    monkeypatch.setattr(hidden, "branches", lambda *_: {})
    found, _ = states_and_gradients(model, groups, plain=False)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-6)
    assert (
        min(float((a - b).abs().max()) for a, b in zip(found[1:], expected[1:], strict=True)) > 0.01
    )


def test_the_answer_is_that_of_transformers(model: CAFe):
    """Generation is not ours: the functions without segments are the model's own."""
    text = "Is it a cat?"
    conversation = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    inputs = model.processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    own = model.generate(text, max_new_tokens=8)
    tail = out[0, inputs["input_ids"].shape[1] :]
    assert own == model.processor.tokenizer.decode(tail, skip_special_tokens=True).strip()


# ------------------------------------------------------------------ what cannot branch


def test_a_layer_of_another_kind_is_refused_by_name(model: CAFe):
    class OtherLayer(torch.nn.Module):
        """Its module, this one, has no gated delta rule."""

    decoder = SimpleNamespace(
        config=SimpleNamespace(layer_types=["linear_attention"]), layers=[OtherLayer()]
    )
    with pytest.raises(
        FamilyError, match="OtherLayer: its 'linear_attention' is not the gated delta"
    ):
        allow_branches(decoder)
    config = SimpleNamespace(layer_types=["mamba"], model_type="jamba")
    config.get_text_config = lambda: config
    with pytest.raises(FamilyError, match="'mamba' layers cannot share a row; cafe supports"):
        layer_windows(config)


def test_a_saved_model_is_the_same_model(model: CAFe, tmp_path: Path):
    model.save_pretrained(tmp_path)
    again = in_float64(CAFe.from_pretrained(tmp_path, dtype=torch.float64, device="cpu"))
    texts = ["a cat", "a big red cat at the top left", "a big dog"]
    np.testing.assert_allclose(again.encode(texts), model.encode(texts), atol=1e-5)
