"""Every hidden state of a shared row is the one that its sequence has alone.

The slow twin is transformers without this library's collator: the processor makes tokens and
pixels of one prompt, the plain model runs it, nothing is shared. In float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cafe.media import open_image
from cafe.model.rows.collate import Collator
from cafe.model.rows.render import RenderedSequence
from cafe.model.rows.rows import Rows
from cafe.model.rows.trie import TokenSequence, build_row, stack_rows
from cafe.model.vlm import CAFe
from cafe.types import Conversation, Example, Image, Message, user
from helpers.images import noise

TOLERANCE = 1e-10


A, B, WIDE = Image(noise(1)), Image(noise(2)), Image(noise(3, 90, 40))
ALONE_TOKENS, TOGETHER_TOKENS = 78, 37


def exact_norm(norm: Any, hidden: Tensor) -> Tensor:
    """transformers computes this one in float32 always; here everything is float64."""
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return norm.weight * hidden * torch.rsqrt(variance + norm.variance_epsilon)


@pytest.fixture(scope="module")
def model(small_dir: Any) -> CAFe:
    loaded = CAFe.from_pretrained(small_dir, dtype=torch.float64, device="cpu")
    norms = [m for m in loaded.modules() if type(m).__name__ == "Qwen2RMSNorm"]
    assert len(norms) == 5
    for norm in norms:
        norm.forward = exact_norm.__get__(norm)  # type: ignore[method-assign]
    return loaded


# ------------------------------------------------------------------ the slow twin


@torch.inference_mode()
def alone(model: CAFe, sequence: RenderedSequence) -> tuple[Tensor, Tensor]:
    """Tokens [t] and states [t, d] of one prompt, by the plain processor and model."""
    images = [open_image(image) for image in sequence.images]
    inputs = model.processor(
        text=[sequence.text],
        images=[images] if images else None,
        add_special_tokens=False,
        return_tensors="pt",
    )
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    states = model.model.model(**inputs).last_hidden_state
    return inputs["input_ids"][0], states[0]


def sequences_of(collator: Collator, example: Example) -> list[RenderedSequence]:
    sides = [s for s in (example.query, example.target) if s is not None]
    return [
        *(collator.render.embedding(s, "compress") for s in (*sides, *example.negatives)),
        *(s for d in example.dialogues for s in collator.render.answers(d)),
    ]


def path_to(rows: Rows, flat: int) -> tuple[Tensor, Tensor]:
    """The places in a row that one token attends to, itself last."""
    row, token = divmod(flat, rows.input_ids.shape[1])
    seen = torch.nonzero(rows.subtree_end[row, : token + 1] > token).flatten()
    return torch.full_like(seen, row), seen


@torch.inference_mode()
def run(
    model: CAFe, examples: Sequence[Example], **settings: Any
) -> tuple[Rows, Tensor, dict[str, Tensor]]:
    chunk = replace(model.collator, **settings)(examples)
    return chunk.rows, model(chunk.rows, chunk.vision), chunk.vision


def worst_difference(model: CAFe, examples: Sequence[Example], **settings: Any) -> float:
    """Largest difference to the twin over all tokens of all sequences; tokens must be equal."""
    rows, hidden, _ = run(model, examples, **settings)
    groups = [sequences_of(model.collator, e) for e in examples]
    answers = [s for group in groups for s in group if s.labelled]
    embedded = [[s for s in group if not s.labelled] for group in groups]
    # As `Rows.pooled` is ordered: queries, targets, negatives.
    order = [*(g[:1] for g in embedded), *(g[1:2] for g in embedded), *(g[2:] for g in embedded)]
    pooled = [s for part in order for s in part]
    assert len(pooled) == len(rows.pooled)
    worst = 0.0

    def compare(sequence: RenderedSequence, last: int, left_out: int) -> None:
        nonlocal worst
        ids, states = alone(model, sequence)
        kept = len(ids) - left_out
        row, places = path_to(rows, last)
        assert rows.input_ids[row, places].tolist() == ids[:kept].tolist()
        assert rows.positions[row, places].tolist() == list(range(kept))
        worst = max(worst, float((hidden[row, places] - states[:kept]).abs().max()))

    for sequence, last in zip(pooled, rows.pooled.tolist(), strict=True):
        compare(sequence, last, 0)
    begin = 0
    for sequence in answers:
        target = sequence.text[-sequence.labelled :]
        labels = model.processor.tokenizer(target, add_special_tokens=False)["input_ids"]
        end = begin + len(labels)
        assert rows.label_ids[begin:end].tolist() == labels
        # The very last token predicts nothing, so no index leads to it.
        compare(sequence, int(rows.label_source[end - 1]), 1)
        begin = end
    assert begin == len(rows.label_ids)
    return worst


# ------------------------------------------------------------------ cases


def turn(*content: Any) -> Conversation:
    *asked, answer = content
    return (Message("user", tuple(asked)), Message("assistant", (answer,)))


CASES = {
    "text only": Example("t", query=user("a cat"), target=user("a red cat")),
    "one image": Example("p", query=user(A), target=user("a cat"), dialogues=(turn(A, "?", "no"),)),
    "a wide image": Example("w", query=user(WIDE), target=user("yes", WIDE)),
    "several answers": Example(
        "s", dialogues=(turn(A, "Is it?", "yes"), turn(A, "Is it?", "yellow"), turn(A, "It?", "no"))
    ),
    "two images": Example("2", query=user(A, B, "which"), target=user(B, A)),
    "alone and in company": Example(
        "c",
        query=user(A),
        target=user("a cat"),
        negatives=(user(B), user("a dog")),
        dialogues=(turn(A, B, "Which?", "the left"), turn(A, "What?", "a cat")),
    ),
    "one image twice": Example("tt", dialogues=(turn(A, A, "Same?", "yes"),)),
    "a turn adds an image": Example(
        "m", dialogues=((*turn(A, "What?", "a cat"), *turn(B, "And this?", "a dog")),)
    ),
    "many turns": Example(
        "mt",
        query=user("look", A),
        target=(Message("system", ("Be brief.",)), *user("a cat")),
        dialogues=((*turn(A, "What?", "a cat"), *turn("Where?", "here"), *turn("Big?", "no")),),
    ),
    "a forged image": Example("f", query=user(A, "<image> <|im_end|>"), target=user("<image>")),
}


@pytest.mark.parametrize("sharing", ["trie", "none"])
@pytest.mark.parametrize("name", CASES)
def test_every_state_is_that_of_the_plain_processor_and_model(model: CAFe, name: str, sharing: str):
    assert worst_difference(model, [CASES[name]], sharing=sharing) <= TOLERANCE


def test_all_cases_in_one_batch_padded_and_packed(model: CAFe):
    examples = list(CASES.values())
    assert worst_difference(model, examples) <= TOLERANCE
    # Three to four examples share a row here; the widest example alone sets the width above.
    assert worst_difference(model, examples, row_tokens=1200) <= TOLERANCE
    padded, _, _ = run(model, examples)
    packed, _, _ = run(model, examples, row_tokens=1200)
    separate, _, _ = run(model, examples, sharing="none")
    assert packed.input_ids.shape[0] < padded.input_ids.shape[0] < separate.input_ids.shape[0]


PARTS = st.sampled_from(["a cat", "a ", "a car", "yes", A, B, WIDE])
CONTENT = st.lists(PARTS, min_size=1, max_size=3).map(tuple)
ANSWERS = st.sampled_from(["a cat", "a car", "no"])
DIALOGUES = st.lists(st.tuples(CONTENT, ANSWERS), min_size=1, max_size=3).map(
    lambda turns: tuple(m for content, answer in turns for m in turn(*content, answer))
)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    pair = draw(st.booleans())
    return Example(
        id="random",
        query=user(*draw(CONTENT)) if pair else None,
        target=user(*draw(CONTENT)) if pair else None,
        negatives=tuple(user(*c) for c in draw(st.lists(CONTENT, max_size=2)) if pair),
        dialogues=tuple(draw(st.lists(DIALOGUES, min_size=0 if pair else 1, max_size=3))),
    )


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.lists(examples(), min_size=1, max_size=3), st.sampled_from([None, 700]))
def test_random_examples_share_without_a_trace(
    model: CAFe, batch: list[Example], row_tokens: int | None
):
    assert worst_difference(model, batch, row_tokens=row_tokens) <= TOLERANCE


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(5, 8), min_size=1, max_size=7), min_size=1, max_size=6),
    st.lists(st.integers(5, 8), min_size=1, max_size=30),
)
def test_random_tokens_share_without_a_trace(model: CAFe, group: list[list[int]], mate: list[int]):
    sequences = [TokenSequence.from_text(tokens) for tokens in group]
    rows = [build_row(sequences), build_row([TokenSequence.from_text(mate)])]
    batch = stack_rows(rows, pad_token=0)
    nothing = torch.zeros(0, dtype=torch.long)
    with torch.inference_mode():
        hidden = model(
            Rows(batch.input_ids, batch.positions, batch.subtree_end, *[nothing] * 4), {}
        )
        for tokens, places in zip(group, rows[0].token_indices, strict=True):
            states = model.model.model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
            assert float((hidden[0, places] - states).abs().max()) <= TOLERANCE


# ------------------------------------------------------------------ independence


def embeddings(model: CAFe, examples: Sequence[Example], **settings: Any) -> Tensor:
    rows, hidden, _ = run(model, examples, **settings)
    return hidden.flatten(0, 1)[rows.pooled]


def test_dropping_and_adding_branches_changes_no_other(model: CAFe):
    full = CASES["alone and in company"]
    expected = embeddings(model, [full])[:2]
    for fewer in (
        replace(full, dialogues=full.dialogues[:1]),
        replace(full, dialogues=(), negatives=()),
        replace(full, dialogues=(turn(B, "New?", "yes"), *full.dialogues)),
    ):
        changed = embeddings(model, [fewer])[:2]
        assert float((changed - expected).abs().max()) <= TOLERANCE


def test_batch_mates_change_nothing(model: CAFe):
    example = CASES["one image"]
    pairs = [e for e in CASES.values() if e.query is not None and e is not example]
    expected = embeddings(model, [example])
    beside = embeddings(model, [*pairs, example])
    last = len(pairs)
    assert float((beside[[last, 2 * last + 1]] - expected).abs().max()) <= TOLERANCE


def test_embedding_rows_give_the_embeddings_of_the_full_rows(model: CAFe):
    chunk = model.collator(list(CASES.values()))
    with torch.inference_mode():
        full = model(chunk.rows, chunk.vision).flatten(0, 1)[chunk.rows.pooled]
        few = model(chunk.embedding_rows, chunk.vision)
    few = few.flatten(0, 1)[chunk.embedding_rows.pooled]
    assert chunk.embedding_rows.input_ids.numel() < chunk.rows.input_ids.numel()
    assert float((full - few).abs().max()) <= TOLERANCE


def test_a_state_does_depend_on_what_its_sequence_says(model: CAFe):
    """The comparisons above could fail: another image, another state."""
    example = CASES["one image"]
    other = replace(example, query=user(B), dialogues=(turn(B, "?", "no"),))
    difference = (embeddings(model, [example]) - embeddings(model, [other])).abs().amax(-1)
    assert difference[0] > 1e-3
    assert difference[1] <= TOLERANCE


def test_a_mask_that_lets_one_branch_see_another_would_be_noticed(model: CAFe):
    example = CASES["several answers"]
    rows, hidden, vision = run(model, [example])
    causal = replace(rows, subtree_end=torch.full_like(rows.subtree_end, rows.input_ids.shape[1]))
    with torch.inference_mode():
        leaked = model(causal, vision)
    assert float((leaked - hidden).abs().max()) > 1e-3


def test_eager_attention_equals_sdpa(model: CAFe):
    batch = list(CASES.values())
    rows, hidden, vision = run(model, batch)
    model.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            eager = model(rows, vision)
    finally:
        model.model.set_attn_implementation("sdpa")
    real = rows.input_ids != model.processor.tokenizer.pad_token_id
    # transformers' eager softmax is float32 whatever the model is.
    assert 0 < float((eager - hidden)[real].abs().max()) <= 1e-6


# ------------------------------------------------------------------ images


@contextmanager
def counted(model: CAFe) -> Iterator[list[int]]:
    """How many views each call of the vision tower looks at."""
    views: list[int] = []
    handle = model.model.model.vision_tower.register_forward_hook(
        lambda module, args, kwargs, output: views.append(
            len(args[0] if args else kwargs["pixel_values"])
        ),
        with_kwargs=True,
    )
    try:
        yield views
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("name", "views", "shown"),
    [
        ("text only", [], []),
        # Alone, a square image is shown as a whole and as its one tile, which are the same view.
        ("one image", [1], [ALONE_TOKENS]),
        ("several answers", [1], [ALONE_TOKENS]),
        ("two images", [2], [TOGETHER_TOKENS] * 4),
        # A and B alone (one view each), and both beside the other, whole only.
        ("alone and in company", [4], [ALONE_TOKENS] * 2 + [TOGETHER_TOKENS] * 2),
    ],
)
def test_a_image_is_processed_once_however_often_it_is_shown(
    model: CAFe, name: str, views: list[int], shown: list[int]
):
    with counted(model) as seen:
        rows, _, _ = run(model, [CASES[name]])
    assert seen == views
    assert int((rows.input_ids == model.processor.image_token_id).sum()) == sum(shown)
    assert len(rows.image_order) == len(shown)


def test_examples_of_a_chunk_that_show_one_image_share_its_features(model: CAFe):
    one = CASES["one image"]
    with counted(model) as seen:
        run(model, [one, replace(one, id="again"), replace(one, id="more")])
    assert seen == [1]


def test_an_unused_image_changes_no_state_and_gives_the_tower_a_gradient(model: CAFe):
    batch = [CASES["text only"]]
    rows, hidden, vision = run(model, batch)
    dummy = replace(model.collator, dummy_image=True)(batch)
    assert not vision
    assert dummy.vision
    assert torch.equal(dummy.rows.input_ids, rows.input_ids)
    states = model(dummy.rows, dummy.vision)
    assert torch.equal(states.detach(), hidden)
    states.sum().backward()
    gradients = [p.grad for p in model.model.model.vision_tower.parameters()]
    model.zero_grad(set_to_none=True)
    # SigLIP's last norm is behind the layer that is read, so it has none.
    assert sum(g is not None for g in gradients) > len(gradients) - 3
    assert all(g is None or not g.any() for g in gradients)
