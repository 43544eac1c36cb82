"""The pure rules that families add to the trie: positions on a grid, sight, windows."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.errors import FamilyError
from cafe.model import hidden
from cafe.model.families import Grid
from cafe.model.families.mrope import mrope_positions
from cafe.model.image_keys import image_keys, image_runs, visible_until
from cafe.model.rows.trie import AttentionRule, TokenSequence, build_row, padding_mask, stack_rows
from cafe.model.vlm import CAFe, layer_windows
from cafe.types import Example, user
from helpers import builders
from helpers.family_examples import EXAMPLES, A, B, turn

TEXT = [7]


def keys_of(*parts: Any) -> np.ndarray:
    """Ints are text tokens; (image, features) is an image."""
    return np.concatenate([[p] if isinstance(p, int) else image_keys(*p) for p in parts])


# ------------------------------------------------------------------ positions


def test_positions_that_a_person_can_check():
    """Two words, an image of 2 lines and 3 columns, two words: the longer side counts."""
    found = mrope_positions(keys_of(5, 6, (0, 6), 8, 9), [Grid(1, 2, 3)])
    assert found.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_text_counts_alike_on_every_axis():
    assert mrope_positions(keys_of(5, 6, 7), []).tolist() == [[0, 1, 2]] * 4


def test_a_later_image_is_looked_up_by_its_number():
    found = mrope_positions(keys_of((1, 2), 5, (0, 1)), [Grid(1, 1, 1), Grid(1, 2, 1)])
    assert found[1:].tolist() == [[0, 0, 2, 3], [0, 1, 2, 3], [0, 0, 2, 3]]


@cache
def random_model(name: str) -> Any:
    return builders.FAMILIES[name](builders.Sizes())[0].model


@pytest.mark.parametrize(
    "name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "glm46v"]
)
@settings(max_examples=30, deadline=None)
@given(
    parts=st.lists(
        st.one_of(st.integers(1, 5), st.tuples(st.just(1), st.integers(1, 4), st.integers(1, 4))),
        min_size=1,
        max_size=6,
    )
)
def test_positions_are_those_of_the_model_itself(name: str, parts: list[Any]):
    """`get_rope_index` of transformers; between images there is always a token, as there is."""
    model = random_model(name)
    grids = [Grid(*p) for p in parts if isinstance(p, tuple)]
    pieces: list[Any] = []
    number = 0
    for part in parts:
        if isinstance(part, tuple):
            pieces += [(number, part[1] * part[2]), 3]
            number += 1
        else:
            pieces += [4] * part
    keys = keys_of(*pieces)
    expected, _ = model.get_rope_index(
        input_ids=torch.ones(1, len(keys), dtype=torch.long),
        mm_token_type_ids=torch.from_numpy(keys < 0).long()[None],
        image_grid_thw=torch.tensor([[g.frames, 2 * g.lines, 2 * g.columns] for g in grids] or None)
        if grids
        else None,
    )
    assert mrope_positions(keys, grids)[1:].tolist() == expected[:, 0].tolist()


def test_a_row_carries_the_positions_of_its_sequences_and_refuses_unequal_ones():
    grids = [Grid(1, 1, 2)]
    keys = [keys_of(5, (0, 2), 6, 7), keys_of(5, (0, 2), 6, 8, 9)]
    sequences = [TokenSequence(np.abs(k), k, mrope_positions(k, grids)) for k in keys]
    row = build_row(sequences)
    assert row.positions.shape == (4, 7)
    for sequence, places in zip(sequences, row.token_indices, strict=True):
        assert row.positions[:, places].tolist() == sequence.positions.tolist()  # type: ignore[union-attr]
    batch = stack_rows([row, build_row(sequences[:1])], pad_token=0)
    assert batch.positions.shape == (4, 2, 7)
    wrong = TokenSequence(np.abs(keys[1]), keys[1], mrope_positions(keys[1], [Grid(1, 2, 1)]))
    with pytest.raises(ValueError, match="unequal positions"):
        build_row([sequences[0], wrong])


# ------------------------------------------------------------------ sight and windows


def test_runs_and_sight_that_a_person_can_check():
    """The same image twice, and two parts of one image with a word between them."""
    first, second = image_keys(1, 4)[:2], image_keys(1, 4)[2:]
    keys = np.concatenate([TEXT, image_keys(0, 2), image_keys(0, 2), TEXT, first, TEXT, second])
    assert image_runs(keys) == [(1, 3), (3, 5), (6, 8), (9, 11)]
    assert visible_until(keys[None]).tolist() == [[1, 3, 3, 5, 5, 6, 8, 8, 9, 11, 11]]
    assert image_runs(np.array([5, 6])) == []


ROWS = st.lists(
    st.lists(st.sampled_from([5, 6, (0, 3), (1, 2)]), min_size=1, max_size=5).map(
        lambda parts: keys_of(*parts)
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([None, 1, 2, 4]), st.booleans())
def test_a_row_allows_what_each_sequence_alone_allows(
    group: list[np.ndarray], window: int | None, sighted: bool
):
    """Against the definition: causal, or in one run of an image; within the window."""
    row = build_row([TokenSequence(np.abs(keys), keys) for keys in group])
    batch = stack_rows([row], pad_token=0)
    sight = torch.from_numpy(visible_until(batch.keys)) if sighted else None
    rule = AttentionRule(batch.subtree_end, sight, batch.positions, window)
    mask = rule.dense()[0, 0].numpy()
    for keys, places in zip(group, row.token_indices, strict=True):
        runs = image_runs(keys) if sighted else []
        for i in range(len(keys)):
            for j in range(len(keys)):
                together = any(a <= i < b and a <= j < b for a, b in runs)
                allowed = (j <= i or together) and (window is None or i - j < window)
                assert mask[places[i], places[j]] == allowed, (i, j)
        others = np.setdiff1d(np.arange(len(row)), places)
        assert not mask[np.ix_(places, others)].any()


def test_flex_attention_gets_the_same_rule():
    from torch.nn.attention.flex_attention import create_mask

    group = [keys_of(5, (0, 6), 6, 7), keys_of(5, (0, 6), 6, 8, (1, 3), 9), keys_of(5, 5)]
    rows = [
        build_row([TokenSequence(np.abs(k), k) for k in group]),
        build_row([TokenSequence(np.abs(group[1]), group[1])]),
    ]
    batch = stack_rows(rows, pad_token=0)
    sight = torch.from_numpy(visible_until(batch.keys))
    length = batch.input_ids.shape[1]
    for sighted in (None, sight):
        for window in (None, 3):
            rule = AttentionRule(batch.subtree_end, sighted, batch.positions, window)
            mask = create_mask(rule.mask_mod(), 2, None, length, length, device="cpu")
            assert torch.equal(mask, rule.dense())


def text_config(**fields: Any) -> Any:
    text = SimpleNamespace(**fields)
    return SimpleNamespace(model_type="toy", get_text_config=lambda: text)


def test_windows_of_each_kind_of_language_model():
    assert layer_windows(text_config()) == {"every": None}
    assert layer_windows(text_config(sliding_window=8)) == {"every": 8}
    kinds = ["sliding_attention", "full_attention"]
    assert layer_windows(text_config(sliding_window=8, layer_types=kinds)) == {
        "full_attention": None,
        "sliding_attention": 8,
    }
    kinds = ["linear_attention", "full_attention", "conv"]
    assert layer_windows(text_config(layer_types=kinds)) == {"full_attention": None}
    with pytest.raises(FamilyError, match=r"'toy'.*'mamba' layers cannot share"):
        layer_windows(text_config(layer_types=["mamba"]))


# ------------------------------------------------------------------ templates


def test_a_images_line_ends_join_with_the_words_around_it(tmp_path: Path):
    """Gemma3 writes line ends around an image; tokenised apart they would be other tokens."""
    model = CAFe.from_pretrained(builders.build("gemma3", tmp_path / "gemma3"))
    rows, _ = model.collator.embedding_rows([user(A)])
    tokenizer = model.processor.tokenizer
    three = tokenizer("\n\n\n", add_special_tokens=False)["input_ids"]
    assert len(three) == 1
    # "user\n" and the "\n\n" that begin the image.
    assert rows.input_ids[0].tolist().count(three[0]) == 1


def test_an_answer_begins_as_the_template_writes_it_and_turns_end_where_it_says(tmp_path: Path):
    model = CAFe.from_pretrained(builders.build("idefics3", tmp_path / "idefics3"))
    (answer,) = model.collator.render.answers(turn(A, "Is it?", "yes"))
    assert answer.text.endswith("Is it?<end_of_utterance>\nAssistant: yes<end_of_utterance>")
    assert answer.text[-answer.labelled :] == " yes<end_of_utterance>"
    # The vocabulary holds <|im_end|> too.
    assert "<|im_end|>" in model.processor.tokenizer.get_vocab()
    assert model.collator.pooled_token == "<end_of_utterance>"


def test_an_answer_that_the_template_does_not_close_ends_with_eos(tmp_path: Path):
    model = CAFe.from_pretrained(builders.build("glm4v", tmp_path / "glm4v"))
    asked = (*turn(A, "Is it?", "yes"), *turn("Why?", "so"))
    first, second = model.collator.render.answers(asked)
    assert first.text.endswith("Is it?<|assistant|>\nyes<|endoftext|>")
    assert first.text[-first.labelled :] == "yes<|endoftext|>"
    assert second.text.endswith("yes<|user|>\nWhy?<|assistant|>\nso<|endoftext|>")
    assert model.collator.pooled_token == "<|endoftext|>"


def test_examples_that_share_a_image_share_its_tokens(tmp_path: Path):
    model = CAFe.from_pretrained(builders.build("qwen3_vl", tmp_path / "qwen3_vl"))
    example = Example("e", dialogues=(turn(A, "Is it?", "yes"), turn(A, B, "Which?", "no")))
    rows = model.collator([example]).rows
    assert rows.positions.shape[0] == 4
    assert int((rows.input_ids == model.processor.image_token_id).sum()) == 2 * 16
    assert rows.image_order.tolist() == [0, 1]


# ------------------------------------------------------------------ rows of one sequence


def test_a_padding_mask_is_enough_where_nothing_is_shared(
    family_model: CAFe, monkeypatch: pytest.MonkeyPatch
):
    """What FlashAttention-2 is given; here SDPA reads it, as transformers makes of it."""
    if family_model.family.bidirectional_image_attention:
        return
    chunk = replace(family_model.collator, sharing="none")(EXAMPLES)
    with torch.inference_mode():
        expected = family_model(chunk.rows, chunk.vision)
        real = padding_mask(chunk.rows.subtree_end)
        monkeypatch.setattr(hidden, "attention_masks", lambda *_: real)
        found = family_model(chunk.rows, chunk.vision)
    assert 0 < int(real.sum()) < real.numel()
    assert float((found - expected)[real.bool()].abs().max()) <= 1e-6


def test_a_row_with_branches_has_no_padding_mask(family_model: CAFe):
    rows = family_model.collator(EXAMPLES).rows
    with pytest.raises(ValueError, match="collate with sharing none"):
        padding_mask(rows.subtree_end)


def test_flash_attention_shares_nothing_and_refuses_images_that_see_themselves(
    family_model: CAFe,
):
    config = family_model.model.config
    config._attn_implementation = "flash_attention_2"
    try:
        if family_model.family.bidirectional_image_attention:
            with pytest.raises(FamilyError, match="flash_attention_2 cannot do; use sdpa or flex"):
                CAFe(family_model.model, family_model.processor)
        else:
            model = CAFe(family_model.model, family_model.processor)
            assert model.collator.sharing == "none"
    finally:
        config._attn_implementation = "sdpa"
