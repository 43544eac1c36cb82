"""What makes `encode` and `score` fast changes no value: each short cut beside its slow twin."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.errors import ImageError
from cafe.model.ahead import ahead
from cafe.model.families import llava_onevision
from cafe.model.inputs import as_messages
from cafe.model.last_layer import prepare, read_only_at
from cafe.model.masks import mask_of
from cafe.model.packing import shared_rows
from cafe.model.rows import Rows
from cafe.model.trie import TokenSequence, build_row
from cafe.model.vlm import CAFe


def noise(seed: int, width: int = 96, height: int = 96) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


SQUARE, WIDE = noise(1), noise(2, 120, 50)
TEXTS = [
    "the red cat at the top left",
    "the red cat at the top",
    "the red cat and a dog",
    "a dog",
    "the red cat at the top left",
    "no",
]
INPUTS: list[Any] = [*TEXTS, SQUARE, WIDE, {"text": "what", "image": [SQUARE, WIDE]}, noise(3)]
FREE_ATTENTION, FREE_MATRICES = 1e9, 0.0


def alone(model: CAFe, rendered: Any) -> torch.Tensor:
    """States of each input in a row and a batch of its own, every layer whole: [n, hidden]."""
    states = []
    with torch.inference_mode():
        for value in INPUTS:
            rows, vision = rendered(as_messages([value]))
            states.append(model(rows, vision).flatten(0, 1)[rows.pooled][0])
    return torch.stack(states)


# ------------------------------------------------------------------ sharing rows


@pytest.mark.parametrize("kind", ["embedding_rows", "prompt_rows"])
def test_inputs_that_share_a_row_have_the_states_that_they_have_alone(small_model: CAFe, kind: str):
    collate = getattr(small_model.collator, kind)
    slow = alone(small_model, collate)
    conversations = as_messages(INPUTS)
    counts = set()
    for token_cost in (FREE_MATRICES, 30.0, 500.0, FREE_ATTENTION):
        rows, vision = collate(conversations, token_cost=token_cost)
        with torch.inference_mode():
            states = small_model.read(rows, vision)
        assert (states - slow).abs().max() <= 1e-5
        counts.add(len(rows.input_ids))
    assert min(counts) == 1, "where attention is free, all of them are one row"
    assert max(counts) >= len(INPUTS) // 2, "and where the matrices are, few share one"


def test_rows_are_not_shared_where_attention_cannot(small_model: CAFe):
    from dataclasses import replace

    separate = replace(small_model.collator, sharing="none")
    rows, _ = separate.embedding_rows(as_messages(TEXTS), token_cost=FREE_ATTENTION)
    assert len(rows.input_ids) == len(TEXTS)


def tokens_of(keys: list[np.ndarray], rows: list[list[int]]) -> list[int]:
    made = [build_row([TokenSequence(keys[i], keys[i]) for i in row]) for row in rows]
    return [len(row) for row in made]


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=8), min_size=1, max_size=12),
    st.sampled_from([0.0, 2.0, 10.0, 1e6]),
)
@settings(deadline=None, max_examples=150)
def test_the_chosen_rows_cost_no_more_than_any_other_cut(sequences: list[list[int]], cost: float):
    keys = [np.array(s, dtype=np.int64) for s in sequences]
    rows = shared_rows(keys, cost)
    assert sorted(i for row in rows for i in row) == list(range(len(keys)))
    assert all(rows)

    def price(cut: list[list[int]]) -> float:
        longest = max(tokens_of(keys, cut))
        return len(cut) * longest * (cost + longest)

    others = [[[i] for i in range(len(keys))], [list(range(len(keys)))]]
    assert price(rows) <= min(map(price, others))


def test_equal_beginnings_are_put_into_one_row():
    keys = [np.array([*begin, i]) for i in range(6) for begin in ([7] * 9, [8] * 9)]
    rows = shared_rows(keys, 40.0)
    assert len(rows) < len(keys)
    assert all(len({keys[i][0] for i in row}) == 1 for row in rows)
    assert shared_rows([], 1.0) == []


def test_texts_about_one_picture_are_scored_in_one_row(small_model: CAFe):
    seen: list[torch.Size] = []
    handle = small_model.model.model.language_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["inputs_embeds"].shape), with_kwargs=True
    )
    try:
        together = small_model.score(SQUARE, TEXTS)
    finally:
        handle.remove()
    one = small_model.collator.prompt_rows(as_messages([{"image": SQUARE, "text": TEXTS[0]}]))[0]
    ((rows, tokens, _),) = seen
    assert rows * tokens < 3 * one.input_ids.numel(), "six questions, fewer than three pictures"
    apart = [float(small_model.score(SQUARE, [text])[0]) for text in TEXTS]
    assert np.abs(together - apart).max() <= 1e-6
    assert np.ptp(together) > 1e-4


# ------------------------------------------------------------------ causal rows


def test_rows_of_one_sequence_each_need_no_mask(small_model: CAFe):
    """The causal kernel gives the states and gradients of the dense rule, padding or not."""
    rows, vision = small_model.collator.embedding_rows(as_messages(INPUTS))
    assert rows.plain
    assert mask_of(rows, small_model.model, window=None) is None
    masked = replace(rows, plain=False)
    assert mask_of(masked, small_model.model, window=None) is not None

    def states_and_gradients(read: Rows) -> tuple[torch.Tensor, list[torch.Tensor]]:
        small_model.zero_grad()
        states = small_model(read, vision).flatten(0, 1)[read.pooled]
        states.square().sum().backward()
        gradients = [p.grad.clone() for p in small_model.parameters() if p.grad is not None]
        small_model.zero_grad()
        return states.detach(), gradients

    states, gradients = states_and_gradients(rows)
    expected, expected_gradients = states_and_gradients(masked)
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)


def test_rows_that_branch_keep_their_mask(small_model: CAFe):
    """Under the causal kernel a branch would see the one before it."""
    rows, vision = small_model.collator.embedding_rows(
        as_messages(TEXTS), token_cost=FREE_ATTENTION
    )
    assert not rows.plain
    with torch.inference_mode():
        right = small_model.read(rows, vision)
        wrong = small_model.read(replace(rows, plain=True), vision)
    assert (right - wrong).abs().max() > 1e-3, "the mask would not be missed"


# ------------------------------------------------------------------ the last layer


def test_the_last_layer_is_computed_where_it_is_read(small_model: CAFe):
    rows, vision = small_model.collator.embedding_rows(as_messages(INPUTS))
    sizes: list[int] = []
    mlp = small_model.model.model.language_model.layers[-1].mlp
    handle = mlp.gate_proj.register_forward_pre_hook(
        lambda _, x: sizes.append(x[0].shape[:-1].numel())
    )
    try:
        with torch.inference_mode():
            whole = small_model(rows, vision).flatten(0, 1)[rows.pooled]
            read = small_model.read(rows, vision)
    finally:
        handle.remove()
    assert (whole - read).abs().max() <= 1e-5
    assert sizes == [rows.input_ids.numel(), len(INPUTS)]


def test_reading_in_one_thread_leaves_the_others_alone(small_model: CAFe):
    """And a model that is wrapped twice reads as one that is wrapped once."""
    prepare(small_model.model.get_decoder())
    rows, vision = small_model.collator.embedding_rows(as_messages(TEXTS))
    with torch.inference_mode():
        want = small_model(rows, vision)
    found: list[torch.Tensor] = []

    def other() -> None:
        with torch.inference_mode():
            found.append(small_model(rows, vision))

    with read_only_at(rows.pooled, rows.input_ids.shape):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with torch.inference_mode():
            own = small_model(rows, vision)
    assert torch.equal(found[0], want)
    elsewhere = torch.ones(want.shape[0] * want.shape[1], dtype=torch.bool)
    elsewhere[rows.pooled] = False
    assert ((own - want).flatten(0, 1)[elsewhere].abs().max()) > 1e-2, "there it is nonsense"


# ------------------------------------------------------------------ a picture's two equal views


@pytest.mark.parametrize(
    "shown",
    [
        [[SQUARE]],
        [[WIDE]],
        [[SQUARE], [noise(4)]],
        [[SQUARE], [WIDE], [noise(5, 300, 300)], [noise(6, 20, 90)]],
        [[SQUARE, WIDE], [noise(7), SQUARE, noise(8)]],
    ],
)
def test_features_are_those_of_transformers_and_equal_views_are_seen_once(
    small_model: CAFe, shown: list[list[PIL.Image.Image]]
):
    inputs = small_model.family.process_images(small_model.processor, shown).inputs
    inner = small_model.model.model
    seen: list[int] = []
    handle = inner.vision_tower.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    try:
        with torch.inference_mode():
            found = llava_onevision._picture_features(inner, **inputs)
            want = inner.get_image_features(**inputs, return_dict=True).pooler_output
    finally:
        handle.remove()
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-6
    once, all_views = seen
    squares = sum(len(group) == 1 and group[0].width == group[0].height for group in shown)
    assert all_views - once == squares


# ------------------------------------------------------------------ threads ahead


def test_results_come_in_order_whatever_takes_longest():
    def slow(i: int) -> int:
        time.sleep(0.02 if i % 3 == 0 else 0)
        return i * i

    for threads in (0, 1, 2, 5, 50):
        assert list(ahead(slow, range(12), threads)) == [i * i for i in range(12)]
        assert list(ahead(slow, [], threads)) == []


def test_the_next_items_are_begun_and_no_more_than_that():
    begun: list[int] = []
    third = threading.Event()

    def note(i: int) -> int:
        begun.append(i)
        if i == 2:
            third.set()
        return i

    results = ahead(note, range(10), 2)
    assert next(results) == 0
    assert third.wait(10), "while the first is used, the third is made"
    time.sleep(0.05)
    assert sorted(begun) == [0, 1, 2]
    results.close()  # type: ignore[attr-defined]
    assert len(begun) <= 3


def test_an_error_comes_where_its_result_would():
    def fail(i: int) -> int:
        if i == 3:
            raise KeyError(i)
        return i

    results: Iterator[int] = ahead(fail, range(9), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError):
        next(results)
    assert threading.active_count() == 1 or not any(
        t.name.startswith("ahead") for t in threading.enumerate()
    )


def test_pictures_are_decoded_by_several_threads(small_model: CAFe, tmp_path: Path):
    """With the values, and the names in errors, that one thread gives."""
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        noise(i).save(path)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        several = small_model.encode(paths, batch_size=4)
        torch.set_num_threads(1)
        assert np.abs(small_model.encode(paths, batch_size=4) - several).max() <= 1e-5
        torch.set_num_threads(4)
        paths[4].write_bytes(b"nothing")
        with pytest.raises(ImageError, match=r"input 4: picture .*4\.png"):
            small_model.encode(paths)
    finally:
        torch.set_num_threads(before)


def test_threads_that_encode_at_once_do_not_disturb_each_other(small_model: CAFe):
    want = small_model.encode(INPUTS, batch_size=3)
    found: dict[int, np.ndarray] = {}

    def encode(i: int) -> None:
        found[i] = small_model.encode(INPUTS, batch_size=2 + i)

    threads = [threading.Thread(target=encode, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    answer = small_model.generate("hi", max_new_tokens=5)
    for thread in threads:
        thread.join()
    assert answer == small_model.generate("hi", max_new_tokens=5)
    for array in found.values():
        assert np.abs(array - want).max() <= 1e-5
