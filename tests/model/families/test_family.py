"""Each family: shared rows equal transformers' own processor and model, sequence by sequence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from cafe.model import attention
from cafe.model.checkpoint.directory import kernels
from cafe.model.families import family_of
from cafe.model.rows.matching import match_question
from cafe.model.vlm import CAFe
from cafe.recipes import Objective
from cafe.types import Example, user
from helpers import plain, twin
from helpers.family_examples import EXACT, EXAMPLES, TALL, WIDE, A, B
from helpers.models import in_float64

JOINT = Objective(contrastive_weight=0.7, language_weight=1.3)


@pytest.mark.parametrize("sharing", ["trie", "none"])
def test_every_state_and_position_is_that_of_the_plain_processor_and_model(
    family_model: CAFe, sharing: str
):
    assert plain.worst_difference(family_model, EXAMPLES, sharing=sharing) <= EXACT


def test_packed_rows_and_eager_attention_change_nothing(family_model: CAFe):
    rows, _, _ = plain.run(family_model, EXAMPLES, row_tokens=1500)
    assert len(rows.input_ids) < len(EXAMPLES)
    assert plain.worst_difference(family_model, EXAMPLES, row_tokens=1500) <= EXACT
    family_model.model.set_attn_implementation("eager")
    try:
        # transformers' eager softmax is float32 whatever the model is.
        assert plain.worst_difference(family_model, EXAMPLES) <= 1e-5
    finally:
        family_model.model.set_attn_implementation(kernels("sdpa", family_model.model.config))


def test_losses_and_gradients_are_those_of_three_separate_passes(family_model: CAFe):
    examples = twin.make_examples(3)
    contrastive, language = twin.three_passes(family_model, examples, JOINT)
    expected = twin.gradients(family_model)
    for chunk in (None, 1):
        numbers = twin.run_step(family_model, examples, JOINT, chunk)
        torch.testing.assert_close(numbers.contrastive, contrastive, rtol=0, atol=EXACT)
        torch.testing.assert_close(numbers.language, language, rtol=0, atol=EXACT)
        assert twin.worst_difference(twin.gradients(family_model), expected) < 1e-5
    learned = [
        name
        for name, p in family_model.named_parameters()
        if p.requires_grad and "audio_tower" not in name  # it hears in test_audio.py
    ]
    moved = [name for name in learned if expected[name].abs().max() > 1e-9]
    assert len(moved) > 0.9 * len(learned), "most gradients are zero: nothing was compared"


# ------------------------------------------------------------------ the comparison can fail


def states(model: CAFe, rows: Any, vision: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model(rows, vision).flatten(0, 1)[rows.pooled]


def test_wrong_positions_masks_and_images_would_be_noticed(family_model: CAFe):
    rows, hidden, vision = plain.run(family_model, EXAMPLES[1:2])
    right = hidden.flatten(0, 1)[rows.pooled]
    length = rows.input_ids.shape[1]
    row_index = torch.arange(length).expand_as(rows.positions)
    wrong = {
        "positions by row index": replace(rows, positions=row_index.contiguous()),
        "a causal mask": replace(rows, subtree_end=torch.full_like(rows.subtree_end, length)),
    }
    if rows.positions.ndim == 3:
        wrong["text positions for images"] = replace(
            rows, positions=rows.depth.expand_as(rows.positions)
        )
    if rows.visible_until is not None:
        wrong["no look ahead"] = replace(rows, visible_until=None)
    for name, changed in wrong.items():
        difference = (states(family_model, changed, vision) - right).abs().amax(-1)
        assert float(difference.max()) > 1e-4, name
    other, _, other_vision = plain.run(family_model, [replace(EXAMPLES[1], query=user(B))])
    assert float((states(family_model, other, other_vision) - right)[0].abs().max()) > 1e-4


def test_a_window_measured_in_row_indices_would_be_noticed(
    family_model: CAFe, monkeypatch: pytest.MonkeyPatch
):
    """What a branch sees must not depend on the branches before it."""
    rows, right, vision = plain.run(family_model, EXAMPLES[1:2])
    index = torch.arange(rows.input_ids.shape[1]).expand_as(rows.depth)
    by_depth = attention.mask_of

    def by_index(rows: Any, model: Any, window: int | None) -> Any:
        return by_depth(replace(rows, positions=index), model, window)

    monkeypatch.setattr(attention, "mask_of", by_index)
    with torch.inference_mode():
        difference = float((family_model(rows, vision) - right).abs().max())
    has_window = family_model.family.model_type in {
        "gemma3",
        "gemma4",
        "lfm3_vl",
        "llava_next",
        "llava_onevision",
        "qwen2_vl",
    }
    assert (difference > 1e-4) == has_window


# ------------------------------------------------------------------ facts


def test_the_parts_cover_every_parameter_exactly_once(family_model: CAFe):
    parts = family_of(family_model.model.config).parts
    names = [n for n, _ in family_model.model.named_parameters(remove_duplicate=False)]
    for name in names:
        assert sum(name.startswith(prefixes) for prefixes in parts.values()) == 1, name
    for prefixes in parts.values():
        for prefix in prefixes:
            assert any(name.startswith(prefix) for name in names), prefix


def test_what_is_said_to_be_unused_is_unused_and_nothing_else_is(family_model: CAFe):
    chunk = family_model.collator(EXAMPLES)
    family_model(chunk.rows, chunk.vision).square().sum().backward()
    model = family_model.model
    silent = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    model.zero_grad(set_to_none=True)
    hearing = {name for name in silent if name.startswith("model.audio_tower.")}
    assert silent - hearing <= {"lm_head.weight"}
    assert not hearing or family_model.family.audio_inputs
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert all(name.startswith(family_model.family.unused(model.config)) for name in frozen)


def test_an_unused_image_gives_the_tower_a_gradient_and_changes_no_state(family_model: CAFe):
    _, hidden, _ = plain.run(family_model, EXAMPLES[:1])
    chunk = replace(family_model.collator, dummy_image=True)(EXAMPLES[:1])
    found = family_model(chunk.rows, chunk.vision)
    assert torch.equal(found.detach(), hidden)
    found.sum().backward()
    part = family_model.family.parts["vision"] + family_model.family.parts["projector"]
    silent = [
        name
        for name, p in family_model.model.named_parameters()
        if name.startswith(part) and p.requires_grad and p.grad is None
    ]
    family_model.model.zero_grad(set_to_none=True)
    assert not [name for name in silent if "newline" not in name]


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (200, 3), (3, 200), (97, 31), (640, 480)])
def test_there_are_as_many_features_as_placeholders(family_model: CAFe, size: tuple[int, int]):
    group = [[PIL.Image.new("RGB", size)], [PIL.Image.new("RGB", (50, 60))]]
    family, processor = family_model.family, family_model.processor
    processed = family.process_images(processor, group)
    token = processor.tokenizer.convert_ids_to_tokens(family.placeholder_id(processor))
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in processed.inputs.items()}
    with torch.inference_mode():
        features = family.image_features(family_model.model.model, inputs)
    assert [len(f) for f in features] == [text.count(token) for text in processed.placeholders]


# ------------------------------------------------------------------ what users call


def question(*content: Any) -> dict[str, Any]:
    parts = [
        {"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c.source}
        for c in content
    ]
    return {"role": "user", "content": parts}


ASKED = [[question(A, "Is it a cat?")], [question("Why?")], [question(B, WIDE, "Which is it?")]]
ENCODED: list[Any] = ["a cat", A.source, {"text": "red", "image": [B.source, TALL.source]}]


def test_encode_and_generate_survive_saving_and_loading(family_model: CAFe, tmp_path: Path):
    family_model.save_pretrained(tmp_path / "saved")
    loaded = CAFe.from_pretrained(tmp_path / "saved", dtype=torch.float64, device="cpu")
    original = CAFe(family_model.model, family_model.processor)

    in_float64(loaded)
    np.testing.assert_array_equal(loaded.encode(ENCODED), original.encode(ENCODED))
    assert loaded.generate(ASKED, max_new_tokens=4) == original.generate(ASKED, max_new_tokens=4)
    assert loaded.collator.pooled_token == family_model.collator.pooled_token


def test_a_batch_of_embeddings_is_that_of_each_input_alone(family_model: CAFe):
    together = family_model.encode(ENCODED)
    apart = np.stack([family_model.encode(value) for value in ENCODED])
    np.testing.assert_allclose(together, apart, atol=1e-6)


def test_generated_tokens_are_those_of_the_plain_model(family_model: CAFe):
    """Left padding, positions and images of a batch against each prompt alone."""
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": family_model.collator.pad_id,
    }
    answers = family_model.generate(ASKED, max_new_tokens=6, eos_token_id=None)
    from cafe.model.rows.inputs import as_conversation

    for asked, answer in zip(ASKED, answers, strict=True):
        rendered = family_model.collator.render.prompt(as_conversation(asked))
        inputs = plain.plain_inputs(family_model, rendered)
        with torch.inference_mode():
            tokens = family_model.model.generate(**inputs, **settings)
        text = family_model.processor.tokenizer.decode(
            tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert text.strip() == answer


# ------------------------------------------------------------------ match questions


def test_a_text_asked_about_another_image_is_the_question_written_anew(family_model: CAFe):
    """The head of one question and the tail of another are what the renderer would write."""
    collator = replace(family_model.collator, matching=True)
    images = [A, TALL, WIDE, B]
    texts = ["a red mug", "TWO  cats,\nnot one", "", "été 日本"]
    examples = [
        Example(id=str(i), query=user(image), target=user(text or "x"))
        for i, (image, text) in enumerate(zip(images, texts, strict=True))
    ]
    match = collator(examples).match
    assert match is not None
    for head in match.pairs:
        for text, tail in zip(texts, match.pairs, strict=True):
            spliced = head.question(tail.tail)
            question = match_question(user(images[head.group]), user(text or "x"))
            written, _ = collator.prompt_rows([question])
            assert spliced.tokens.tolist() == written.input_ids[0].tolist()
            axes = written.positions.reshape(-1, written.positions.shape[-1])
            if spliced.positions is not None:
                assert spliced.positions.tolist() == axes.tolist()
