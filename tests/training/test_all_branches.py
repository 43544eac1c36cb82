"""Everything that a row can carry at once: the gradients are still those of separate passes.

Hard negatives, two captions of one image, two dialogues, thoughts, match questions, soft labels,
token vectors, Matryoshka widths, and embeddings that are the mean of latent tokens.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.nn import functional

from cafe.model.multi_vector import (
    add_token_projection,
    new_token_projection,
    token_projection_of,
)
from cafe.model.rows.rows import identity
from cafe.recipes import Objective
from cafe.types import Example, thought_about, user
from helpers.marks import slow
from helpers.match_twin import chosen_questions, match_pass, question_odds
from helpers.models import build_small_model, in_float64, with_latent_mean
from helpers.processes import free_port
from helpers.ranks import scored, step_of, worker
from helpers.twin import (
    all_states,
    embedded_states,
    gradients,
    make_examples,
    run_step,
    three_passes,
    worst_difference,
)

EXACT = 1e-9
WIDTHS, TOKEN_WIDTHS, LATENT = (16, 64), (4, 16), 3
STORED = Objective(
    contrastive_weight=0.7,
    language_weight=1.3,
    match_weight=0.6,
    thought_weight=0.4,
    soft_label_weight=0.8,
    multi_vector_weight=0.5,
    multi_vector_dim=16,
    multi_vector_dims=[*TOKEN_WIDTHS],
    multi_vector_temperature=0.07,
    latent_tokens=LATENT,
    latent_pooling="mean",
    matryoshka_dims=[*WIDTHS],
)
MATCHER = STORED.model_copy(update={"soft_labels": "matcher"})


@pytest.fixture(scope="module")
def model() -> Any:
    model = with_latent_mean(build_small_model(), LATENT)
    add_token_projection(model.model, new_token_projection(64, 16))
    return in_float64(model)


def full_examples() -> list[Example]:
    """Six pairs, all but two with hard negatives and scores; two captions are of one image."""
    examples = [scored(e) for e in make_examples(6)]
    examples[5] = dataclasses.replace(
        examples[5], query=examples[0].query, dialogues=examples[0].dialogues[:1]
    )
    for i in (0, 2, 3):
        e = examples[i]
        examples[i] = dataclasses.replace(e, query_thought=thought_about(e.query, f"a cat {i}"))
    e = examples[4]
    examples[4] = dataclasses.replace(e, target_thought=thought_about(e.target, "no no"))
    return examples


def losses_of(scores: Tensor, reverse: Tensor, examples: list[Example]) -> Tensor:
    """InfoNCE both ways: scores [n, n + m] of queries, [n, n] of targets."""
    same = [[identity(a.query) == identity(b.query) for b in examples] for a in examples]
    other = torch.tensor(same) & ~torch.eye(len(examples), dtype=torch.bool)
    own, loose = torch.arange(len(examples)), scores.shape[1] - len(examples)
    scores = scores.masked_fill(functional.pad(other, (0, loose)), -torch.inf)
    reverse = reverse.masked_fill(other, -torch.inf)
    return (functional.cross_entropy(scores, own) + functional.cross_entropy(reverse, own)) / 2


def contrastive_pass(model: Any, examples: list[Example], weight: float, thoughts: bool) -> Tensor:
    queries = [e.query_thought if thoughts and e.query_thought else e.query for e in examples]
    targets = [e.target_thought if thoughts and e.target_thought else e.target for e in examples]
    negatives = [n for e in examples for n in e.negatives]
    sides = [embedded_states(model, side) for side in (queries, targets, negatives)]
    losses = []
    for width in WIDTHS:
        query, target, loose = (functional.normalize(side[:, :width]) for side in sides)
        forward, reverse = query @ torch.cat([target, loose]).T, target @ query.T
        losses.append(losses_of(forward / 0.05, reverse / 0.05, examples))
    loss = torch.stack(losses).mean()
    (weight * loss).backward()
    return loss.detach()


def token_pass(model: Any, examples: list[Example], weight: float) -> Tensor:
    """MaxSim of all pairs, one pair of items at a time."""
    projection = token_projection_of(model.model)
    assert projection is not None

    def vectors(sides: list[Any], width: int) -> list[Tensor]:
        rendered = [model.collator.render.embedding(side, "compress") for side in sides]
        states, lengths = all_states(model, rendered)
        return [
            functional.normalize((row[:n] @ projection.weight.T)[:, :width])
            for row, n in zip(states, lengths.tolist(), strict=True)
        ]

    def scores(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return torch.stack([torch.stack([(q @ t.T).amax(1).mean() for t in b]) for q in a]) / 0.07

    losses = []
    for width in TOKEN_WIDTHS:
        query = vectors([e.query for e in examples], width)
        target = vectors([e.target for e in examples], width)
        loose = vectors([n for e in examples for n in e.negatives], width)
        losses.append(losses_of(scores(query, [*target, *loose]), scores(target, query), examples))
    loss = torch.stack(losses).mean()
    (weight * loss).backward()
    return loss.detach()


def divergence(anchor: Tensor, candidates: Tensor, scores: Tensor) -> Tensor:
    """KL(teacher || student), the mean over the widths."""
    parts = []
    for width in WIDTHS:
        near = functional.cosine_similarity(anchor[None, :width], candidates[:, :width])
        student = torch.log_softmax(near / 0.05, 0)
        parts.append(functional.kl_div(student, torch.softmax(scores, 0), reduction="sum"))
    return torch.stack(parts).mean()


def soft_pass(model: Any, examples: list[Example], weight: float, matcher: bool) -> Tensor:
    asked = _judged(model, examples) if matcher else _stored(examples)
    losses = [
        divergence(embedded_states(model, [anchor])[0], embedded_states(model, sides), scores)
        for anchor, sides, scores in asked
    ]
    loss = torch.stack(losses).mean()
    (weight * loss).backward()
    return loss.detach()


def _stored(examples: list[Example]) -> list[tuple[Any, list[Any], Tensor]]:
    return [
        (e.query, [e.target, *e.negatives], torch.tensor(e.scores, dtype=torch.float64))
        for e in examples
        if e.scores is not None
    ]


@torch.no_grad()
def _judged(model: Any, examples: list[Example]) -> list[tuple[Any, list[Any], Tensor]]:
    """The match questions about each image and each text that is no hard negative."""
    questions = chosen_questions(model, examples)
    odds = question_odds(model, questions)
    negatives = {identity(n) for e in examples for n in e.negatives}
    found = []
    # A text or an image that occurs twice among the pairs has an embedding, and an anchor, each.
    for side in (0, 1):
        anchors: dict[str, list[int]] = {}
        for i, question in enumerate(questions):
            anchors.setdefault(identity(question[side]), []).append(i)
        for name, own in anchors.items():
            if name not in negatives and len(own) > 1:
                others = [questions[i][1 - side] for i in own]
                found.append((questions[own[0]][side], others, odds[own]))
    return found


def separate_passes(model: Any, examples: list[Example], matcher: bool) -> dict[str, Tensor]:
    """The losses of the batch; every one is backpropagated by itself."""
    only_language = STORED.model_copy(update={"contrastive_weight": 0.0})
    _, language = three_passes(model, examples, only_language)
    return {
        "language": language,
        "contrastive": contrastive_pass(model, examples, 0.7, thoughts=False),
        "thought": contrastive_pass(model, examples, 0.4, thoughts=True),
        "match": match_pass(model, examples, 0.6)[0],
        "soft_label": soft_pass(model, examples, 0.8, matcher),
        "multi_vector": token_pass(model, examples, 0.5),
    }


@pytest.mark.parametrize("matcher", [False, *slow(True)], ids=["stored", "matcher"])
@pytest.mark.parametrize("chunk", [4, *slow(None, 1)])
@pytest.mark.parametrize("sharing", ["trie", *slow("none")])
def test_all_branches_have_the_gradients_of_separate_passes(
    model: Any, chunk: int | None, sharing: str, matcher: bool
) -> None:
    examples = full_examples()
    if matcher:  # of an image that occurs twice the questions are about two embeddings
        examples = examples[:5]
    losses = separate_passes(model, examples, matcher)
    expected = gradients(model)
    assert expected["model.token_projection.weight"].abs().max() > 1e-3
    numbers = run_step(model, examples, MATCHER if matcher else STORED, chunk, sharing)
    assert worst_difference(gradients(model), expected) < EXACT
    for name, loss in losses.items():
        torch.testing.assert_close(getattr(numbers, name), loss, rtol=0, atol=1e-9)
    assert min(losses.values()) > 0.01


def test_without_match_questions_a_single_chunk_is_direct(model: Any) -> None:
    examples = full_examples()
    separate_passes(model, examples, matcher=False)
    expected = gradients(model)
    match_pass(model, examples, 0.6)
    asked = gradients(model)
    run_step(model, examples, STORED.model_copy(update={"match_weight": 0.0}))
    rest = {name: expected[name] - asked[name] for name in expected}
    assert worst_difference(gradients(model), rest) < EXACT


def test_the_comparison_can_fail(model: Any) -> None:
    examples = full_examples()
    run_step(model, examples, STORED, 2)
    expected = gradients(model)
    for name in ("thought_weight", "match_weight", "soft_label_weight", "multi_vector_weight"):
        changed = STORED.model_copy(update={name: getattr(STORED, name) + 0.01})
        run_step(model, examples, changed, 2)
        assert worst_difference(gradients(model), expected) > 1e-4, name


def test_pairs_and_chunks_that_lack_everything(model: Any) -> None:
    """Conversations only in one chunk, texts only in another."""
    examples = full_examples()
    examples[2] = dataclasses.replace(
        examples[2], query=None, target=None, negatives=(), scores=None, query_thought=None
    )
    examples[4] = Example("texts", query=user("a big cat"), target=user("the small cat"))
    for objective in (STORED, MATCHER):
        run_step(model, examples, objective)
        expected = gradients(model)
        for chunk in (1, 2):
            run_step(model, examples, objective, chunk)
            assert worst_difference(gradients(model), expected) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("match", [0.0, 0.6])
@pytest.mark.parametrize("chunk", [0, 2], ids=["whole", "chunks"])
def test_two_processes_have_the_gradients_of_one(chunk: int, match: float, tmp_path: Path) -> None:
    settings = (match, 0.4, 0.5, "scores", LATENT)
    multiprocessing.spawn(worker, args=(free_port(), chunk, str(tmp_path), *settings), nprocs=2)
    model, contrast, numbers = step_of(-1, 0, False, *settings)
    expected = gradients(model)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert worst_difference(found["gradients"], expected) < EXACT
        torch.testing.assert_close(found["temperature"], contrast.log_temperature.grad)
        for name in ("thought", "soft_label", "multi_vector", *(["match"] if match else [])):
            torch.testing.assert_close(found[name], getattr(numbers, name))
