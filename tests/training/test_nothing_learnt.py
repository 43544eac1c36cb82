"""Answers of which no token is labelled: all of them end a run before it begins, one is told."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cafe.errors import NoLabelledTokens, TrainingError
from cafe.model.rows import collate, official
from cafe.model.rows.render import Renderer
from cafe.training.run import train
from cafe.types import Example, Message, user
from helpers.runs import make_world, recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def lose_answers_in_official(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(official, "_ASSISTANT_TURN", re.compile(r"<\|im_start\|>bot\n(.*?)\n"))


def label_turn_ends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Renderer.answers

    def ends(self: Renderer, dialogue: Any) -> Any:
        return [replace(s, labelled=len("<|im_end|>")) for s in answers(self, dialogue)]

    monkeypatch.setattr(Renderer, "answers", ends)


@pytest.mark.parametrize(
    ("lose", "compat"), [(lose_answers_in_official, "official"), (label_turn_ends_only, "none")]
)
def test_a_run_that_would_learn_no_answer_is_refused(
    lose: Any, compat: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(monkeypatch)
    steps: list[Any] = []
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match="no answer of the first examples would be learned"):
        train(recipe(world, out, f"objective.compat={compat}"), on_step=steps.append)
    assert not steps
    assert not (out / "log.jsonl").exists()


def test_without_a_language_loss_no_answer_is_missed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label_turn_ends_only(monkeypatch)
    settings = ("objective.language_weight=0", "schedule.steps=1", "checkpoint.every_steps=null")
    assert len(train(recipe(world, tmp_path / "out", *settings)).records) == 1


@pytest.mark.slow
def test_one_example_that_would_not_be_learnt_is_left_out_and_told(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = collate.answers_labelled
    seen: list[str] = []

    def but_one(text: str, spans: Any) -> int:
        if not seen:
            seen.append(text)
        return 0 if text == seen[0] else counted(text, spans)

    monkeypatch.setattr(collate, "answers_labelled", but_one)
    train(recipe(world, tmp_path / "out", "objective.compat=official"))
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert "1 of its 1 answers have no labelled token" in json.loads(line)["reason"]


def test_every_answer_of_a_dialogue_counts(
    small_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = (*user("What?"), Message("assistant", ("yes",)), *user("Why?"))
    dialogue = (*talk, Message("assistant", ("a cat",)))
    collator = replace(small_model.collator, official=True)
    assert collator([Example("x", dialogues=(dialogue,))]).label_count
    lost = re.compile(r"<\|im_start\|>assistant\n(y.*?)<\|im_end\|>\n?")
    monkeypatch.setattr(official, "_ASSISTANT_TURN", lost)
    with pytest.raises(
        NoLabelledTokens, match=r"example 'x': 1 of its 2 answers have no labelled token"
    ):
        collator([Example("x", dialogues=(dialogue,))])
