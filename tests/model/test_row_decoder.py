"""Rows that come and go: each writes what plain `generate` writes for its prompt alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cafe.errors import DataError, FamilyError
from cafe.model.inference import generation_inputs, generation_settings
from cafe.model.prefix_cache import Prefix, PrefixCache, image_digests, prefix_key
from cafe.model.row_cache import new_cache
from cafe.model.row_decoder import RowDecoder
from cafe.model.vlm import CAFe
from cafe.types import Conversation, Image, Message, user
from helpers import builders
from helpers.images import noise

TOKENS = 9
LARGE = 2**30

CAT, DOG = (Image(noise(i, w, h), digest=f"{i}") for i, w, h in ((0, 96, 96), (1, 120, 48)))
PROMPTS: list[Conversation] = [
    user(CAT, "a red cat"),
    user("two dogs at the top left yes no small"),
    user(DOG, "Is it a cat?"),
    user(CAT, "Is it a cat? a big red cat at the top left, yes no small"),
    user(CAT, DOG, "which"),
    user(CAT, "a"),
    (Message("system", ("Be brief.",)), *user(CAT, "a red cat")),
    user("before it", CAT, "and after"),
]


def alone(model: CAFe, conversation: Conversation, count: int = TOKENS) -> list[int]:
    """The slow twin: transformers' own `generate`, of one prompt; it does not end by itself."""
    inputs = generation_inputs(model, [conversation], [0])
    settings = generation_settings(model, count, {}) | {"eos_token_id": None}
    with torch.inference_mode():
        tokens = model.generate_tokens(**inputs, **settings)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def continuously(
    model: CAFe,
    arrivals: Sequence[Sequence[Conversation]],
    prefixes: PrefixCache | None,
    counts: Sequence[int],
) -> list[list[int]]:
    """All answers, in order of arrival: a group arrives with each token; each has its length."""
    decoder = RowDecoder(model, prefixes)
    answers: list[list[int]] = []
    rows: list[int] = []
    waiting = list(arrivals)
    while waiting or rows:
        if rows:
            logits = decoder.step([answers[row][-1] for row in rows])
            for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
                answers[row].append(token)
        group = waiting.pop(0) if waiting else []
        if group:
            admitted = decoder.admit(group, list(range(len(group))))
            base = len(answers)
            answers += [[] for _ in group]
            rows += [base + i for i in admitted.order]
            for i, token in zip(admitted.order, admitted.logits.argmax(-1).tolist(), strict=True):
                answers[base + i].append(token)
        stay = [i for i, row in enumerate(rows) if len(answers[row]) < counts[row]]
        decoder.keep(stay)
        rows = [rows[i] for i in stay]
        assert len(decoder) == len(rows)
    return answers


def of(name: str, directory: Path) -> CAFe:
    """With a head of its own, for some random models write the same of everything."""
    model = CAFe.from_pretrained(builders.build(name, directory / name))
    torch.manual_seed(1)
    head = model.model.lm_head
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight), requires_grad=False)
    return model


def takes(model: CAFe, conversation: Conversation) -> bool:
    try:
        model.collator.prompt_rows([conversation])
    except Exception:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", builders.NAMES)
def test_rows_of_every_family_write_what_generate_writes(name: str, tmp_path: Path):
    """Windows are smaller than an image there; some layers carry states or share keys."""
    model = of(name, tmp_path)
    prompts = [p for p in PROMPTS if takes(model, p)]
    assert len(prompts) >= 6
    counts = [TOKENS - i % 4 for i in range(len(prompts))]
    want = [alone(model, p)[:count] for p, count in zip(prompts, counts, strict=True)]
    assert len({tuple(tokens[:5]) for tokens in want}) > 1, "alike, so nothing is shown"
    arrivals = [prompts[:1], prompts[1:4], [], prompts[4:]]
    assert continuously(model, arrivals, None, counts) == want
    prefixes = PrefixCache(LARGE)
    assert continuously(model, arrivals, prefixes, counts) == want
    assert continuously(model, [prompts], prefixes, counts) == want


# ---------------------------------------------------------------------- the prefix cache


def reads(model: CAFe, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images the vision tower is given, each time that it is run."""
    seen: list[int] = []
    original = type(model).encoder_outputs

    def counting(self: CAFe, rows: Any, vision: Any) -> Any:
        seen.append(len(set(rows.image_order.tolist())))
        return original(self, rows, vision)

    monkeypatch.setattr(type(model), "encoder_outputs", counting)
    return seen


def test_an_image_is_read_once_by_those_who_ask_together_and_later(
    babbling_model: CAFe, monkeypatch: pytest.MonkeyPatch
):
    questions = [user(CAT, text) for text in ("a", "a red cat", "Is it a cat? yes no", "small")]
    want = [alone(babbling_model, question) for question in questions]
    assert len({tuple(tokens) for tokens in want}) > 1
    seen = reads(babbling_model, monkeypatch)
    prefixes = PrefixCache(LARGE)
    counts = [TOKENS] * len(questions)
    assert continuously(babbling_model, [questions], prefixes, counts) == want
    assert (seen, prefixes.misses, prefixes.hits) == ([1], 1, 3)
    assert continuously(babbling_model, [[q] for q in questions], prefixes, counts) == want
    assert (seen, prefixes.misses, prefixes.hits) == ([1], 1, 7)
    assert continuously(babbling_model, [[user(DOG, "a")]], prefixes, counts)
    assert (seen, prefixes.misses) == ([1, 1], 2)


def test_a_prefix_that_holds_something_else_changes_the_answer(babbling_model: CAFe):
    """So the tests above could fail: what is kept is what is answered from."""
    prefixes = PrefixCache(LARGE)
    question = user(CAT, "a red cat")
    counts = [TOKENS]
    right = continuously(babbling_model, [[question]], prefixes, counts)
    for prefix in prefixes._prefixes.values():
        for pair in prefix.layers:
            if pair is not None:
                with torch.inference_mode():
                    pair[1].normal_()
    assert continuously(babbling_model, [[question]], prefixes, counts) != right


def test_what_was_read_for_one_owner_is_never_used_for_another(
    babbling_model: CAFe, monkeypatch: pytest.MonkeyPatch
):
    """Equal pixels and words; only the digest, which the server makes of the owner, differs."""
    theirs = replace(CAT, digest="another owner's")
    seen = reads(babbling_model, monkeypatch)
    prefixes = PrefixCache(LARGE)
    both = [user(CAT, "a red cat"), user(theirs, "a red cat")]
    continuously(babbling_model, [both], prefixes, [TOKENS, TOKENS])
    assert (prefixes.misses, prefixes.hits, sum(seen)) == (2, 0, 2)
    nameless = user(replace(CAT, digest=None), "a red cat")
    continuously(babbling_model, [[nameless], [nameless]], prefixes, [TOKENS, TOKENS])
    assert (prefixes.misses, prefixes.hits, len(prefixes)) == (2, 0, 2)


def test_layers_with_a_state_keep_no_prefix(tmp_path: Path):
    model = of("qwen3_5", tmp_path)
    prefixes = PrefixCache(LARGE)
    questions = [user(CAT, "a"), user(CAT, "a red cat")]
    counts = [TOKENS, TOKENS]
    want = [alone(model, question) for question in questions]
    assert continuously(model, [questions], prefixes, counts) == want
    assert (len(prefixes), prefixes.misses) == (0, 0)


def kept(tokens: int, *images: str) -> Prefix:
    keys = torch.zeros(1, 1, tokens, 4)
    return Prefix(images, tokens, [(keys, keys), None])


def test_the_least_recently_used_prefix_is_given_up_first():
    size = kept(10, "a").bytes
    assert size == 10 * 4 * 4 * 2
    prefixes = PrefixCache(2 * size)
    for name in "ab":
        prefixes.add(name.encode(), kept(10, name))
    assert prefixes.find(b"a") is not None
    prefixes.add(b"c", kept(10, "c"))
    assert [prefixes.knows((name,)) for name in "abc"] == [True, False, True]
    assert prefixes.bytes == 2 * size
    prefixes.add(b"d", kept(11, "d"))
    assert (len(prefixes), prefixes.knows(("d",))) == (1, True)
    prefixes.add(b"e", kept(21, "e"))  # larger than everything that may be kept
    assert (len(prefixes), prefixes.knows(("e",)), prefixes.bytes) == (1, False, 11 * 32)


def test_a_bound_that_holds_nothing_changes_no_answer(babbling_model: CAFe):
    questions = [user(CAT, "a"), user(CAT, "a red cat"), user(CAT, "small")]
    want = [alone(babbling_model, question) for question in questions]
    prefixes = PrefixCache(1)
    assert continuously(babbling_model, [questions], prefixes, [TOKENS] * 3) == want
    assert (len(prefixes), prefixes.bytes) == (0, 0)


def test_keys_tell_images_and_tokens_apart():
    keys = [
        prefix_key(("a", "b"), [1, 2]),
        prefix_key(("ab",), [1, 2]),
        prefix_key(("a",), [1, 2]),
        prefix_key(("a",), [1]),
        prefix_key(("a",), [1, 3]),
    ]
    assert len(set(keys)) == len(keys)
    assert image_digests(user(CAT, DOG, "a")) == ("0", "1")
    assert image_digests(user(CAT, Image(noise(3)), "a")) == image_digests(user("a")) == ()


def test_a_cache_of_another_kind_is_refused(babbling_model: CAFe, monkeypatch: pytest.MonkeyPatch):
    config = babbling_model.model.config.get_text_config()
    monkeypatch.setattr(config, "layer_types", ["hybrid"] * len(config.layer_types))
    with pytest.raises(FamilyError, match="LinearAttentionAndFullAttentionLayer"):
        new_cache(babbling_model.model.config)


def test_nothing_has_changed_when_a_prompt_cannot_be_read(babbling_model: CAFe):
    decoder = RowDecoder(babbling_model, PrefixCache(LARGE))
    decoder.admit([user("a cat")], [0])
    words = " ".join(["cat"] * babbling_model.collator.max_tokens)
    with pytest.raises(DataError, match="input 7: the prompt leaves no room"):
        decoder.admit([user("a"), user(words)], [6, 7])
    assert len(decoder) == 1
