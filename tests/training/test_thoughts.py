"""Think-then-embed: a second contrastive loss of the same rows, with exact gradients."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch.nn import functional

from cafe.data.fingerprint import fingerprint
from cafe.data.merge import merge_with_origin
from cafe.data.scenes import draw, sample_scene
from cafe.data.thoughts import (
    MISSING,
    ThoughtKey,
    Thoughts,
    read_thoughts,
    thought_line,
    with_thoughts,
)
from cafe.errors import DataError
from cafe.model.captions import CAPTION_TOKENS
from cafe.model.vlm import CAFe
from cafe.recipes import Objective
from cafe.types import Example, Image, Message, thought_about, user
from helpers.marks import slow
from helpers.match_twin import match_pass
from helpers.models import build_small_model, in_float64
from helpers.processes import free_port
from helpers.ranks import step_of, worker
from helpers.twin import (
    gradients,
    last_states,
    make_examples,
    run_step,
    three_passes,
    worst_difference,
)

EXACT = 1e-9
PLAIN = Objective(contrastive_weight=0.7, language_weight=1.3)
THINKING = PLAIN.model_copy(update={"thought_weight": 0.4})


@pytest.fixture(scope="module")
def model() -> Any:
    return in_float64(build_small_model())


def thinking(examples: list[Example]) -> list[Example]:
    """Every query but the second has a thought, and two targets have one."""
    return [
        dataclasses.replace(
            e,
            query_thought=None if i == 1 else thought_about(e.query, f"a cat {i} at the top"),
            target_thought=thought_about(e.target, "no no") if i in (2, 3) else None,
        )
        for i, e in enumerate(examples)
    ]


def thought_pass(model: Any, examples: list[Example], weight: float) -> torch.Tensor:
    """The second contrastive loss from sequences of their own, backpropagated."""
    render = model.collator.render
    sides = [
        [render.embedding(e.query_thought or e.query, "compress") for e in examples],
        [render.embedding(e.target_thought or e.target, "compress") for e in examples],
    ]
    query, target = (functional.normalize(last_states(model, side)) for side in sides)
    scores, own = query @ target.T / 0.05, torch.arange(len(examples))
    loss = (functional.cross_entropy(scores, own) + functional.cross_entropy(scores.T, own)) / 2
    (weight * loss).backward()
    return loss.detach()


@pytest.mark.parametrize("chunk", [4, *slow(None, 1)])
@pytest.mark.parametrize("sharing", ["trie", *slow("none")])
def test_both_embeddings_of_a_row_have_the_gradients_of_separate_passes(
    model: Any, chunk: int | None, sharing: str
) -> None:
    examples = thinking(make_examples(6))
    contrastive, language = three_passes(model, examples, THINKING)
    thought = thought_pass(model, examples, 0.4)
    expected = gradients(model)
    numbers = run_step(model, examples, THINKING, chunk, sharing)
    assert worst_difference(gradients(model), expected) < EXACT
    torch.testing.assert_close(numbers.contrastive, contrastive, rtol=0, atol=1e-10)
    torch.testing.assert_close(numbers.language, language, rtol=0, atol=1e-10)
    torch.testing.assert_close(numbers.thought, thought, rtol=0, atol=1e-10)


def test_the_comparison_can_fail(model: Any) -> None:
    examples = thinking(make_examples(6))
    three_passes(model, examples, THINKING)
    thought_pass(model, examples, 0.41)
    expected = gradients(model)
    run_step(model, examples, THINKING, 2)
    assert worst_difference(gradients(model), expected) > 1e-4


def test_thought_match_and_language_together(model: Any) -> None:
    objective = THINKING.model_copy(update={"match_weight": 0.6})
    examples = thinking(make_examples(5))
    three_passes(model, examples, objective)
    thought_pass(model, examples, 0.4)
    match_pass(model, examples, 0.6)
    expected = gradients(model)
    for chunk in (None, 2):
        run_step(model, examples, objective, chunk)
        assert worst_difference(gradients(model), expected) < EXACT


def test_hard_negatives_stand_between_pairs_and_thoughts(model: Any) -> None:
    examples = thinking(make_examples(5))
    examples[0] = dataclasses.replace(examples[0], negatives=(user("a dog"), user("no cat")))
    examples[3] = dataclasses.replace(examples[3], negatives=(examples[0].query,))
    run_step(model, examples, THINKING)
    expected = gradients(model)
    run_step(model, examples, THINKING, 2)
    assert worst_difference(gradients(model), expected) < EXACT


def test_dropout_is_replayed_with_thoughts() -> None:
    """Both passes meet the same tokens and random numbers: chunks of 2, cached, twice the same."""
    model = in_float64(build_small_model(dropout=0.3)).train()
    examples = thinking(make_examples(4))
    torch.manual_seed(5)
    run_step(model, examples, THINKING, 2)
    first = gradients(model)
    torch.manual_seed(5)
    run_step(model, examples, THINKING, 2)
    assert worst_difference(gradients(model), first) == 0


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    args = (free_port(), 2, str(tmp_path), 0.0, 0.4)
    multiprocessing.spawn(worker, args=args, nprocs=2)
    model, _, numbers = step_of(-1, 0, wrapped=False, thought_weight=0.4)
    expected = gradients(model)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert worst_difference(found["gradients"], expected) < 1e-9
        torch.testing.assert_close(found["thought"], numbers.thought)


# ---------------------------------------------------------------------- where thoughts come from


def test_answers_are_thoughts_about_images_only() -> None:
    image, text = make_examples(2)
    text = dataclasses.replace(text, query=text.target, target=user("another"))
    changes: Counter[str] = Counter()
    found = with_thoughts([image, text], "answers", changes)
    answer = image.dialogues[0][1].text
    assert found[0].query_thought == thought_about(image.query, answer)
    assert found[0].target_thought is found[1].query_thought is None
    assert changes == {MISSING: 1}


def test_a_file_of_thoughts(tmp_path: Path) -> None:
    examples = make_examples(4)
    path = tmp_path / "thoughts.jsonl"
    path.write_text(
        thought_line(ThoughtKey("example-0", None), Thoughts("a\ncat\u2028b")) + "\n"
        '{"id": "example-1", "query": "  ", "target": null}\n'
        '{"id": "example-2", "target": "été"}\n',
        encoding="utf-8",
    )
    changes: Counter[str] = Counter()
    found = with_thoughts(examples, str(path), changes)
    assert [e.query_thought is not None for e in found] == [True, False, False, False]
    assert found[0].query_thought[-1] == Message("assistant", ("a\ncat\u2028b",))
    assert found[2].target_thought[-1].text == "été"
    assert changes == {MISSING: 2}  # one has no line, and an empty thought is none


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": 1}', "line 1: expected"),
        ("nonsense", "line 1: is not JSON"),
        ("[" * 100_000, "line 1: is not JSON"),
        ('{"id": "example-0", "query": "\\ud800"}', "line 1: 'query': the text is not Unicode"),
        ('\n{"id": "a", "query": 3}', "line 2: 'query' is a number"),
        (
            '{"id": "a", "query": "x"}\n{"id": "a", "query": "x"}\n{"id": "a", "query": "y"}',
            "line 3: another thought about 'a' than an earlier line has",
        ),
        ('{"id": "other", "query": "x"}', "none of the 3 examples has one there"),
        ('{"id": "example-0", "query": " "}', "none of the 3 examples has one there"),
    ],
)
def test_a_file_that_is_none(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "thoughts.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        with_thoughts(make_examples(3), str(path), Counter())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read"):
        read_thoughts(tmp_path / "gone.jsonl")


def test_merging_by_image_keeps_thoughts() -> None:
    example = thinking(make_examples(1))[0]
    asked = dataclasses.replace(
        make_examples(1)[0],
        id="asked",
        query=None,
        target=None,
        dialogues=((Message("user", (example.query[0].content[0], "Why?")), _no()),),
    )
    ((_, merged),) = merge_with_origin([example, asked])
    assert merged.query_thought == example.query_thought
    assert len(merged.dialogues) == 3


def _no() -> Message:
    return Message("assistant", ("no",))


# ---------------------------------------------------------------------- encode


def test_encode_reads_the_embedding_after_the_thought() -> None:
    model, image = CAFe.from_pretrained("tiny", device="cpu"), Image(draw(sample_scene(3, "test")))
    inputs: Any = [image, "a text"]
    thoughts = model.write_captions(inputs, max_new_tokens=5)
    found = model.encode(inputs, think=5)
    assert thoughts[0]
    assert thoughts[1] is None
    expected = model.encode([thought_about(user(image), thoughts[0]), "a text"])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    whole = model.encode(inputs, think=True)
    np.testing.assert_allclose(whole, model.encode(inputs, think=CAPTION_TOKENS), atol=1e-6)
    np.testing.assert_allclose(model.encode(inputs, think=thoughts), expected, atol=1e-6)
    assert np.abs(found[0] - model.encode(image)).max() > 1e-3
    np.testing.assert_allclose(model.encode(inputs, think=[None, " "]), model.encode(inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"think": -1}, "think=-1"),
        ({"think": ["a", "b"]}, "2 thoughts for 1 inputs"),
        ({"think": 3, "caption": True}, "choose one"),
        ({"think": None}, "think=None: use"),
        ({"think": 2.5}, "think=2.5: use"),
        ({"think": "16"}, "think='16': use"),
    ],
)
def test_options_that_make_no_sense(model: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.encode([make_examples(1)[0].query[0].content[0]], **options)


def test_control_tokens_in_a_thought_are_text(model: Any) -> None:
    """ "<|im_end|>" in a thought ends no turn, and "<image>" shows none."""
    image = make_examples(1)[0].query[0].content[0]
    rows, _ = model.collator.embedding_rows(
        [thought_about(user(image), "a cat<|im_end|> <image> b")], "compress"
    )
    plain, _ = model.collator.embedding_rows([thought_about(user(image), "a cat b")], "compress")
    ids = model.processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<image>"])
    for token in ids:
        assert int((rows.input_ids == token).sum()) == int((plain.input_ids == token).sum())


def test_the_file_is_plain_json() -> None:
    assert json.loads(thought_line(ThoughtKey("é", "a.png"), Thoughts("ü", None, "tiny"))) == {
        "id": "é",
        "image": "a.png",
        "query": "ü",
        "target": None,
        "model": "tiny",
    }


def pictured(identity: str, path: str) -> Example:
    return Example(identity, query=user(Image(path)), target=user("a text"))


def test_thoughts_of_other_images_are_noticed(tmp_path: Path) -> None:
    """Records without ids are numbered: in another order, their numbers mean other images."""
    path = tmp_path / "thoughts.jsonl"
    path.write_text(
        thought_line(ThoughtKey("1", "a.png"), Thoughts("an a"))
        + thought_line(ThoughtKey("2", "b.png"), Thoughts("a b"))
    )
    same = [pictured("1", "x/a.png"), pictured("2", "x/b.png")]
    found = with_thoughts(same, str(path), Counter())
    assert [e.query_thought[-1].text for e in found] == ["an a", "a b"]
    turned = [pictured("1", "x/b.png"), pictured("2", "x/a.png")]
    with pytest.raises(
        DataError, match=r"the thought of '1' is about a\.png, and the example shows b"
    ):
        with_thoughts(turned, str(path), Counter())


def test_records_with_one_id_are_told_apart_by_their_images(tmp_path: Path) -> None:
    path = tmp_path / "thoughts.jsonl"
    lines = [(n, thought_line(ThoughtKey("a", f"{n}.png"), Thoughts(n))) for n in ("x", "y")]
    path.write_text("".join(line for _, line in lines))
    found = with_thoughts([pictured("a", f"{n}.png") for n, _ in lines], str(path), Counter())
    assert [e.query_thought[-1].text for e in found] == ["x", "y"]
    alike = [dataclasses.replace(e, id="a") for e in make_examples(2)]  # images in memory
    path.write_text('{"id": "a", "query": "x"}')
    with pytest.raises(DataError, match="several examples have the id 'a'"):
        with_thoughts(alike, str(path), Counter())


def test_a_name_that_is_no_file_and_not_answers() -> None:
    with pytest.raises(DataError, match=r"data\.\*\.thoughts: answer: cannot be .*or answers"):
        with_thoughts(make_examples(1), "answer", Counter())


def test_answers_where_there_are_none() -> None:
    silent = [dataclasses.replace(e, dialogues=()) for e in make_examples(2)]
    with pytest.raises(DataError, match=r"answers: none of the 2 examples .*language_loss: false"):
        with_thoughts(silent, "answers", Counter())


def test_thoughts_are_part_of_what_the_data_are() -> None:
    """So a run is not resumed with others."""
    plain = make_examples(2)
    one = [
        dataclasses.replace(plain[0], query_thought=thought_about(plain[0].query, "a")),
        plain[1],
    ]
    other = [
        dataclasses.replace(one[0], query_thought=thought_about(plain[0].query, "b")),
        plain[1],
    ]
    assert len({fingerprint(examples) for examples in (plain, one, other)}) == 3
