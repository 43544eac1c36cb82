"""Families that hear: shared rows with recordings equal transformers' own processor and model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cafe.errors import DataError
from cafe.model import hearing
from cafe.model.vlm import CAFe
from cafe.recipes import Objective
from cafe.types import Audio, Example, Message, user
from helpers import builders, plain, twin
from helpers.family_examples import EXACT, A, B, turn
from helpers.models import in_float64
from helpers.tones import RATE, tone, write_audio

HEARING = ("qwen2_5_omni",)


@pytest.fixture(scope="module", params=HEARING)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CAFe:
    directory = builders.build(request.param, tmp_path_factory.mktemp("hears") / request.param)
    return in_float64(CAFe.from_pretrained(directory, dtype=torch.float64, device="cpu"))


def noise(seed: int, seconds: float, rate: int = RATE) -> Audio:
    samples = np.random.default_rng(seed).standard_normal(round(seconds * rate)) / 9
    return Audio(samples.astype(np.float32) + tone(300 + 70 * seed, seconds, rate), rate)


SHORT, LONG, SLOW = noise(1, 0.43), noise(2, 1.37), noise(3, 0.9, 8_000)
WHOLE = noise(4, 3.0)

EXAMPLES = [
    Example(
        "shared recording",
        query=user(SHORT),
        target=user("a cat"),
        dialogues=(turn(SHORT, "Is it?", "yes"), turn(SHORT, "Is it?", "yellow")),
    ),
    Example(
        "image and recording",
        query=user(A, LONG, "which"),
        target=user(SHORT, "and", B),
        negatives=(user(SLOW), user("a dog")),
        dialogues=((*turn(A, "What?", "a cat"), *turn(LONG, "And this?", "a dog")),),
    ),
    Example("two recordings", query=user(LONG, SHORT, "same?"), target=user(WHOLE)),
    Example("text", query=user("a cat"), target=user("a red cat")),
]


@pytest.mark.parametrize("sharing", ["trie", "none"])
def test_every_state_and_position_is_that_of_the_plain_processor_and_model(
    model: CAFe, sharing: str
) -> None:
    assert plain.worst_difference(model, EXAMPLES, sharing=sharing) <= EXACT
    assert plain.worst_difference(model, EXAMPLES, row_tokens=1500) <= EXACT


def test_blocks_of_similar_length_change_nothing(model: CAFe) -> None:
    rows, expected, _ = plain.run(model, EXAMPLES)
    blocks, found, _ = plain.run(model, EXAMPLES, block_cost=1)
    assert len(blocks.blocks) > 1
    assert sum(block.recordings for block in blocks.blocks) == len(rows.audio_order)
    states = (expected.flatten(0, 1)[rows.pooled], found.flatten(0, 1)[blocks.pooled])
    torch.testing.assert_close(*states, rtol=0, atol=EXACT)


def test_each_distinct_recording_is_heard_once(
    model: CAFe, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    inner = model.model.model
    own = type(inner).get_audio_features

    def counted(input_features: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counts.append(len(input_features))
        return own(inner, input_features, *args, **kwargs)

    monkeypatch.setattr(inner, "get_audio_features", counted)
    monkeypatch.setattr(inner, "_cafe_given_audio", False)
    hooks = dict(inner._forward_pre_hooks)
    hearing.allow_given_audio(inner, model.family)
    try:
        rows, _, _ = plain.run(model, EXAMPLES[:1])
    finally:
        for key in inner._forward_pre_hooks.keys() - hooks.keys():
            del inner._forward_pre_hooks[key]
    assert counts == [1]
    assert rows.audio_order.tolist() == [0]  # one run of placeholders for three sequences


def separate_passes(model: CAFe, examples: list[Example], objective: Objective) -> Any:
    """Contrastive and language loss, by transformers' own processor and model; backpropagated."""
    render = model.collator.render

    def states(rendered: Any) -> tuple[Any, torch.Tensor]:
        inputs = plain.plain_inputs(model, rendered)
        return inputs, model.model.model(**inputs).last_hidden_state[0]

    def embedded(side: Any) -> torch.Tensor:
        return states(render.embedding(side, "compress"))[1][-1]

    query = torch.stack([embedded(e.query) for e in examples])
    target = torch.stack([embedded(e.target) for e in examples])
    unit = torch.nn.functional.normalize
    scores = unit(query) @ unit(target).T / objective.temperature
    own = torch.arange(len(examples))
    cross = torch.nn.functional.cross_entropy
    contrastive = (cross(scores, own) + cross(scores.T, own)) / 2
    total, count = torch.zeros((), dtype=torch.float64), 0
    for rendered in [r for e in examples for d in e.dialogues for r in render.answers(d)]:
        inputs, hidden = states(rendered)
        tail = rendered.text[len(rendered.text) - rendered.labelled :]
        length = len(model.processor.tokenizer(tail, add_special_tokens=False)["input_ids"])
        logits = model.lm_head(hidden[-1 - length : -1])
        total = total + cross(logits, inputs["input_ids"][0, -length:], reduction="sum")
        count += length
    language = total / count
    loss = objective.contrastive_weight * contrastive + objective.language_weight * language
    loss.backward()
    return contrastive.detach(), language.detach()


def test_losses_and_gradients_are_those_of_separate_passes(model: CAFe) -> None:
    objective = Objective(contrastive_weight=0.7, language_weight=1.3)
    examples = [
        Example(
            str(i),
            query=user(sound),
            target=user(words),
            dialogues=(turn(sound, "What?", words), turn(sound, "Is it?", "yes")),
        )
        for i, (sound, words) in enumerate([(SHORT, "a cat"), (LONG, "a red"), (SLOW, "small")])
    ]
    contrastive, language = separate_passes(model, examples, objective)
    expected = twin.gradients(model)
    for chunk in (None, 1):
        numbers = twin.run_step(model, examples, objective, chunk)
        torch.testing.assert_close(numbers.contrastive, contrastive, rtol=0, atol=EXACT)
        torch.testing.assert_close(numbers.language, language, rtol=0, atol=EXACT)
        assert twin.worst_difference(twin.gradients(model), expected) < 1e-5
    tower = [n for n in expected if "audio_tower" in n and "bos_eos" not in n]
    assert all(float(expected[name].norm()) > 0 for name in tower)


def test_another_recording_would_be_noticed(model: CAFe) -> None:
    def query(audio: Audio) -> torch.Tensor:
        rows, hidden, _ = plain.run(model, [replace(EXAMPLES[0], query=user(audio))])
        return hidden.flatten(0, 1)[rows.pooled[0]]

    assert float((query(SHORT) - query(noise(9, 0.43))).abs().max()) > 1e-4


@pytest.mark.parametrize("seconds", [0.001, 0.01, 0.03, 0.2, 0.2013, 1.0, 2.99, 3.0])
def test_there_are_as_many_features_as_placeholders(model: CAFe, seconds: float) -> None:
    family, processor = model.family, model.processor
    samples = [tone(440, seconds), tone(300, 0.5)]
    processed = family.process_audio(processor, samples)
    token = processor.tokenizer.convert_ids_to_tokens(family.audio_placeholder_id(processor))
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in processed.inputs.items()}
    with torch.inference_mode():
        features = family.audio_features(model.model.model, inputs)
    counts = [text.count(token) for text in processed.placeholders]
    assert [len(f) for f in features] == counts
    assert min(counts) >= 1


def test_lengths_are_known_before_collation(model: CAFe) -> None:
    for example in EXAMPLES:
        rows = model.collator([example]).rows
        assert sum(model.collator.row_lengths(example)) == rows.tokens


def test_silence_that_no_prompt_contains_runs_the_audio_tower(model: CAFe) -> None:
    _, hidden, _ = plain.run(model, EXAMPLES[3:])
    chunk = replace(model.collator, dummy_image=True)(EXAMPLES[3:])
    found = model(chunk.rows, chunk.vision)
    assert torch.equal(found.detach(), hidden)
    found.sum().backward()
    silent = [
        name
        for name, p in model.model.named_parameters()
        if "audio" in name and p.requires_grad and p.grad is None
    ]
    model.model.zero_grad(set_to_none=True)
    assert silent == []


# ------------------------------------------------------------------ what users call


def test_encode_generate_and_score_hear(model: CAFe, tmp_path: Path) -> None:
    inputs = [SHORT, {"audio": LONG, "text": "which"}, {"image": A.source, "audio": SHORT}, "cat"]
    together = model.encode(inputs)
    apart = np.stack([model.encode(one) for one in inputs])
    np.testing.assert_allclose(together, apart, atol=1e-6)
    path = write_audio(tmp_path / "a.flac", tone(440))
    asked = [{"role": "user", "content": [{"type": "audio", "audio": path}, "What is it?"]}]
    part = {"type": "input_audio", "input_audio": {"data": path.read_bytes(), "format": "flac"}}
    same = [{"role": "user", "content": [part, "What is it?"]}]
    np.testing.assert_array_equal(model.encode(path), model.encode(Audio(path)))
    other = [{"role": "user", "content": [{"type": "audio", "audio": LONG}, "And this, is it?"]}]
    answers = model.generate([asked, other, same], max_new_tokens=5, eos_token_id=None)
    assert answers[0] == model.generate(asked, max_new_tokens=5, eos_token_id=None) == answers[2]
    assert answers[1] == model.generate(other, max_new_tokens=5, eos_token_id=None)
    beams = model.generate([asked, other], max_new_tokens=4, num_beams=3, eos_token_id=None)
    alone = [
        model.generate(one, max_new_tokens=4, num_beams=3, eos_token_id=None)
        for one in (asked, other)
    ]
    assert beams == alone
    ranked = model.rerank(SHORT, ["a cat", "a red dog"], by="question")
    assert len(ranked.match) == 2


def test_generated_tokens_are_those_of_the_plain_model(model: CAFe) -> None:
    asked = (Message("user", (SHORT, "and", A, "What?")),)
    answer = model.generate(list(asked), max_new_tokens=6, eos_token_id=None)
    inputs = plain.plain_inputs(model, model.collator.render.prompt(asked))
    with torch.inference_mode():
        tokens = model.model.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=model.collator.pad_id,
        )
    text = model.processor.tokenizer.decode(
        tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert text.strip() == answer


def test_saved_and_loaded_it_hears_the_same(model: CAFe, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    loaded = CAFe.from_pretrained(tmp_path / "saved", dtype=torch.float64, device="cpu")
    np.testing.assert_array_equal(in_float64(loaded).encode([SHORT, A]), model.encode([SHORT, A]))
    template = (tmp_path / "saved" / "embedding_template.jinja").read_text()
    assert "Compress this sound in one word:" in template


def test_of_a_whole_omni_model_the_thinker_is_loaded(tmp_path: Path) -> None:
    """The published layout: thinker, talker and vocoder in one checkpoint."""
    from safetensors.torch import load_file, save_file

    directory = builders.build("qwen2_5_omni", tmp_path / "thinker")
    expected = CAFe.from_pretrained(directory, device="cpu").encode([SHORT, A])
    weights = load_file(directory / "model.safetensors")
    whole = {f"thinker.{name}": tensor for name, tensor in weights.items()}
    save_file(whole, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    outer = {"model_type": "qwen2_5_omni", "thinker_config": config, "enable_audio_output": False}
    (directory / "config.json").write_text(json.dumps(outer))
    loaded = CAFe.from_pretrained(directory, device="cpu")
    np.testing.assert_array_equal(loaded.encode([SHORT, A]), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = CAFe.from_pretrained(tmp_path / "again", device="cpu")
    np.testing.assert_array_equal(again.encode([SHORT, A]), expected)


def test_the_prompt_names_what_is_compressed(model: CAFe) -> None:
    def prompt(*parts: Any) -> str:
        text = model.collator.render.embedding(user(*parts), "compress").text
        return text[text.rindex("Compress") :].partition(":")[0]

    assert prompt(SHORT) == "Compress this sound in one word"
    assert prompt(SHORT, "words") == "Compress this sound and sentence in one word"
    assert prompt(A, SHORT) == "Compress this image and sound in one word"
    assert prompt(A, SHORT, "words") == "Compress this image, sound and sentence in one word"
    assert prompt(A) == "Compress this image in one word"
    assert prompt("words") == "Compress this sentence in one word"


def test_a_recording_that_is_too_long_or_broken_names_the_example(model: CAFe) -> None:
    long = Audio(tone(440, 5.0), RATE)
    with pytest.raises(DataError, match=r"example 'x': audio: it lasts more than 3 seconds"):
        model.collator([Example("x", user(long), user("a"))])
    model.collator([Example("x", user(Audio(tone(440, 5.0), RATE, max_seconds=2)), user("a"))])
    with pytest.raises(DataError, match=r"example 'x': audio: not audio in a format"):
        model.collator([Example("x", user(Audio(b"some text")), user("a"))])


def test_a_model_that_does_not_hear_says_so(small_model: CAFe) -> None:
    with pytest.raises(DataError, match="llava_onevision models do not hear"):
        small_model.encode(SHORT)
