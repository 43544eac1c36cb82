"""Chunks of a number of tokens, and chunks that are in memory only while they are needed."""

from __future__ import annotations

import dataclasses
import random
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from cafe.data.dataset import ExampleSet, ExampleSource
from cafe.errors import TrainingError
from cafe.model.rows.collate import Collator
from cafe.model.rows.trie import padded_tokens
from cafe.recipes import Objective
from cafe.training import loader
from cafe.training.chunks import Collated, StepChunks, StepPlan, chunks_of_tokens
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.data import TrainingData
from cafe.training.loader import Steps, step_loader
from cafe.training.run import train
from cafe.training.step import StepMetrics, TrainingStep
from cafe.types import Example, Image, user
from helpers.marks import slow
from helpers.models import build_small_model, in_float64
from helpers.runs import Killed, die_after, equal, make_world, recipe, weights, without_times
from helpers.twin import gradients, make_examples, worst_difference

JOINT = Objective(contrastive_weight=0.7, language_weight=1.3)
EXACT = 1e-10


@pytest.fixture(scope="module")
def model() -> Any:
    return in_float64(build_small_model())


def data_of(examples: list[Example], batch: int | None = None, steps: int = 1) -> TrainingData:
    together = ExampleSet.build([ExampleSource("all", examples)])
    return TrainingData(together, together.plan(batch or len(examples), seed=0), steps)


def run_step(
    model: Any, chunks: StepChunks | list[Any], objective: Objective = JOINT
) -> StepMetrics:
    return TrainingStep(model, model, ContrastiveLoss(objective), objective)(chunks)


# ---------------------------------------------------------------------- which examples


def test_chunks_hold_rows_of_like_length_within_the_budget() -> None:
    lengths = [[9], [3], [4], [10], [3], [50]]
    # 3 rows of 4 are 12 tokens; with the 9 they were 36; 2 rows of 10 are 20; 50 is alone.
    assert chunks_of_tokens(lengths, 20, None) == [[1, 4, 2], [0, 3], [5]]
    assert chunks_of_tokens(lengths, 12, None) == [[1, 4, 2], [0], [3], [5]]
    assert chunks_of_tokens(lengths, 1000, None) == [[1, 4, 2, 0, 3, 5]]


def test_several_rows_of_an_example_all_count_and_packed_rows_count_packed() -> None:
    assert chunks_of_tokens([[2, 4], [4], [4]], 12, None) == [[0, 1], [2]]
    # Packed up to 8, 3 + 3 and 4 + 4 are two rows of 8 tokens at most; apart, four of 4.
    assert padded_tokens([3, 3, 4, 4], None) == 16
    assert padded_tokens([3, 3, 4, 4], 8) == 16
    assert padded_tokens([4, 4, 4], 8) == 16
    assert chunks_of_tokens([[4], [4], [4]], 12, 8) == [[0, 1], [2]]
    assert padded_tokens([], None) == 0


def test_any_batch_chunk_and_number_of_processes_has_each_example_once(model: Any) -> None:
    chance = random.Random(0)
    examples = [
        Example(str(i), user("a " * chance.randrange(1, 60)), user(f"cat {i}")) for i in range(24)
    ]
    examples[5] = Example("5", user(Image(b"broken")), user("broken"))
    for _ in range(40):
        batch, ranks = chance.randrange(2, 25), chance.randrange(1, 5)
        tokens = chance.choice([None, 1, 100, 300, 10**6])
        chunk = None if tokens else chance.choice([None, 1, 2, 5, 100])
        data = data_of(examples, batch)
        collator = dataclasses.replace(model.collator, row_tokens=chance.choice([None, 120]))
        plans = [Steps(data, collator, chunk, rank, ranks, tokens).plan(0) for rank in range(ranks)]
        found = Counter(i for plan in plans for group in plan.groups for i in group)
        assert found == Counter(data.plan.plan(0))
        assert sum(plan.pairs for plan in plans) == len(found)
        for plan in plans:
            assert plan.groups
            assert plan.examples == batch
            for group in plan.groups if tokens else ():
                rows = [n for i in group if i != 5 for n in collator.row_lengths(examples[i])]
                alone = padded_tokens(rows, collator.row_tokens) <= tokens or len(group) == 1
                assert alone or {*group} & {5}


def test_an_example_beyond_the_budget_is_named(model: Any) -> None:
    examples = [
        Example("short", user("a"), user("b")),
        Example("long", user("a " * 200), user("c")),
    ]
    steps = Steps(data_of(examples), model.collator, None, chunk_tokens=150)
    plan = steps.plan(0)
    assert len(plan.groups) == 2
    assert plan.oversized == ("long", sum(model.collator.row_lengths(examples[1])))
    assert dataclasses.replace(steps, chunk_tokens=10**6).plan(0).oversized is None


# ---------------------------------------------------------------------- the same gradients


@pytest.fixture(scope="module")
def uneven() -> list[Example]:
    """Examples of 80 to 400 tokens: with one image, with two, with none; one cannot be used."""
    examples = make_examples(9)
    second = make_examples(9, seed=1)
    for i in (2, 5):
        examples[i] = dataclasses.replace(
            examples[i], target=(*examples[i].target, *second[i].query)
        )
    examples[6] = dataclasses.replace(examples[6], query=user("a cat " * 40), dialogues=())
    examples[7] = dataclasses.replace(examples[7], query=user(Image(b"broken")))
    examples[8] = dataclasses.replace(examples[8], negatives=(examples[0].target,))
    return examples


@pytest.mark.parametrize("tokens", [300, *slow(1, 700, 1500)])
@pytest.mark.parametrize("objective", [JOINT, Objective(contrastive_weight=0.0)], ids=["", "chat"])
def test_gradients_do_not_depend_on_the_budget(
    model: Any, uneven: list[Example], tokens: int, objective: Objective
) -> None:
    data = data_of(uneven)
    whole = run_step(model, Steps(data, model.collator, None)[0].chunks, objective)
    expected = gradients(model)
    cut = Steps(data, model.collator, None, chunk_tokens=tokens, keep=2)[0]
    assert len(cut.chunks) > 1
    found = run_step(model, cut.chunks, objective)
    assert worst_difference(gradients(model), expected) < EXACT
    torch.testing.assert_close(found.contrastive, whole.contrastive, rtol=0, atol=EXACT)
    torch.testing.assert_close(found.language, whole.language, rtol=0, atol=EXACT)
    assert (found.tokens, found.pairs) == (whole.tokens, whole.pairs)
    assert [item.record for item in cut.skipped] == ["id 'example-7'"]


@pytest.mark.slow
def test_dropout_is_the_same_whether_chunks_are_kept_or_collated_again() -> None:
    model = in_float64(build_small_model(dropout=0.3)).train()
    data = data_of(make_examples(6))
    results = []
    for keep in (1, 100):
        torch.manual_seed(3)
        run_step(model, Steps(data, model.collator, 1, keep=keep)[0].chunks)
        results.append(gradients(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_padding_is_counted(model: Any) -> None:
    texts = [Example(str(i), user(t), user("b")) for i, t in enumerate(("a", "a a a a a a a a"))]
    short, long = (sum(model.collator.row_lengths(example)) for example in texts)
    numbers = run_step(model, Steps(data_of(texts), model.collator, None)[0].chunks)
    assert (numbers.row_tokens, numbers.padding) == (2 * long, long - short)
    numbers = run_step(model, Steps(data_of(texts), model.collator, 1)[0].chunks)
    assert (numbers.row_tokens, numbers.padding) == (short + long, 0)
    gradients(model)


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize("batch", [8, 16])
@pytest.mark.slow
def test_the_number_of_chunks_in_memory_does_not_grow_with_the_batch(
    model: Any, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, alive, most = 2, weakref.WeakSet[Any](), 0
    original = Collator.__call__

    def counted(self: Collator, examples: Any) -> Any:
        nonlocal most
        chunk = original(self, examples)
        alive.add(chunk.vision["pixel_values"])
        most = max(most, len(alive))
        return chunk

    monkeypatch.setattr(Collator, "__call__", counted)
    data = data_of(make_examples(batch))
    run_step(model, Steps(data, model.collator, 1, keep=keep)[0].chunks)
    gradients(model)
    assert most == keep + 2  # the one in use, and the next


def test_a_chunk_that_changes_between_the_passes_is_an_error(model: Any) -> None:
    whole = model.collator(make_examples(2))
    less = model.collator(make_examples(1))

    def collate(number: int, times: int) -> Collated:
        return Collated(less if number == 1 and times else whole, [])

    chunks = StepChunks(StepPlan(((0, 1), (2, 3)), 3, 4, 4), collate, keep=1)
    assert len([*chunks]) == 2
    with pytest.raises(TrainingError, match="data changed during a step: example 'example-1' can"):
        list(chunks)


@pytest.mark.parametrize("tokens", [None, 200])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_collate_every_chunk_of_both_passes(
    model: Any, tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(
        data_of(make_examples(12), 6, steps=4),
        model.collator,
        None if tokens else 1,
        chunk_tokens=tokens,
        keep=2,
    )
    expected = [[chunk.ids for chunk in steps[step].chunks] for step in range(4)]
    assert all(len(ids) > 2 for ids in expected)
    loaded = step_loader(steps, 0, 4, workers=2)
    for step in range(4):
        item = next(loaded)
        # The workers were started before this; the training process itself is to collate nothing.
        monkeypatch.setattr(loader.Steps, "collated", forbidden)
        if step == 2:  # what an error leaves unused is not taken for the next step's
            next(iter(item.chunks))
            continue
        assert [chunk.ids for chunk in item.chunks] == expected[step]
        assert [chunk.ids for chunk in item.chunks] == expected[step]
        shared = [chunk.vision["pixel_values"].is_shared() for chunk in item.chunks._kept.values()]
        assert shared == [False, False]
    loaded.close()


def forbidden(*_: Any) -> None:
    raise AssertionError("collated in the training process")


# ---------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_a_run_with_chunks_of_tokens_resumes_bit_for_bit_and_says_once_what_exceeds_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world(tmp_path, dropout=0.2)
    cut = ("batch.chunk=null", "batch.chunk_tokens=150", "batch.kept_chunks=1")
    train(recipe(world, tmp_path / "never", *cut))
    assert sum("is a chunk of its own" in message for message in caplog.messages) == 1
    lines = without_times(tmp_path / "never")
    assert all(0 <= line["padding"] < 1 for line in lines)
    again = (*cut, "batch.workers=1")
    with pytest.raises(Killed):
        train(recipe(world, tmp_path / "killed", *again), on_step=die_after(5))
    train(recipe(world, tmp_path / "killed", *again), resume=True)
    assert without_times(tmp_path / "killed") == lines
    assert equal(weights(tmp_path / "killed"), weights(tmp_path / "never"))
