"""Signs that a run goes wrong: each is said once, in one line, and a healthy run says nothing."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cafe.metrics import effective_rank, modality_gap, uniformity
from cafe.training.build import track_numbers, track_samples
from cafe.training.divergence import LEAST, WINDOW, DivergenceDetector, geometry
from cafe.training.log import (
    EvaluationRecord,
    LogReader,
    Reporter,
    RunLog,
    SampleAnswer,
    StepRecord,
    read_log,
)


def record(step: int, loss: float, norm: float = 2.0, **values: Any) -> StepRecord:
    return StepRecord(step, loss, loss, 0.0, norm, 1e-3, 1.0, 1.0, 0.0, 1.0, **values)


def said(records: list[StepRecord], detector: DivergenceDetector | None = None) -> list[str]:
    detector = detector or DivergenceDetector()
    return [text for one in records for text in detector.check(one)]


def healthy(count: int) -> list[float]:
    """Falls from 4 to 1, with noise of a tenth."""
    noise = np.random.default_rng(0).normal(0, 0.1, count)
    return [1 + 3 * math.exp(-i / 40) + float(noise[i]) for i in range(count)]


def test_a_healthy_run_says_nothing() -> None:
    norms = np.random.default_rng(1).lognormal(0, 0.4, 400)
    losses = healthy(400)
    assert said([record(i, losses[i], float(norms[i])) for i in range(400)]) == []
    assert said([record(i, 0.001 * (1 + i % 3)) for i in range(200)]) == [], "a loss of nearly 0"


def test_a_spike_is_said_once_with_its_numbers() -> None:
    losses = healthy(200)
    losses[150] = losses[160] = 9.1
    (text,) = said([record(i, loss) for i, loss in enumerate(losses)])
    assert text.startswith("warning: step 150: the loss is 9.1, and the median of the 50 steps")
    assert f"is {np.median(losses[150 - WINDOW : 150]):.3g}; a lower" in text


def test_the_first_steps_say_nothing() -> None:
    losses = [1.0] * (LEAST - 1) + [50.0]
    assert said([record(i, loss) for i, loss in enumerate(losses)]) == []


def test_a_loss_that_stays_up_is_said() -> None:
    """Each step is only a little above the one before."""
    losses = [1 + max(0, i - 100) / 100 for i in range(300)]
    (text,) = said([record(i, loss) for i, loss in enumerate(losses)])
    assert "the median of the loss over 50 steps has risen to 1.5, from 1 at step" in text


def test_an_exploding_gradient_is_said_once() -> None:
    norms = [2.0] * 60 + [19.0, 21.0, 400.0]
    (text,) = said([record(i, 1.0, norm) for i, norm in enumerate(norms)])
    assert text.startswith("warning: step 61: the gradient's norm is 21, and the median of the 50")


def batch(spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings around one direction."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.ones(32)
    sides = [middle + spread * torch.randn(16, 32, generator=generator) for _ in range(2)]
    return sides[0], sides[1]


def test_the_geometry_of_a_batch_is_that_of_its_worse_side() -> None:
    query, target = batch(1.0, 0)[0], batch(0.1, 1)[1]
    measured = geometry(query, target)
    assert measured is not None
    sides = query.numpy(), target.numpy()
    assert measured.modality_gap == modality_gap(*sides)
    assert measured.uniformity == uniformity(sides[1]) > uniformity(sides[0])
    assert measured.effective_rank == effective_rank(sides[1]) < effective_rank(sides[0])
    assert geometry(query[:1], target[:1]) is None
    assert geometry(query * 0, target) is None


def test_a_collapse_is_said_and_embeddings_that_never_were_apart_are_not() -> None:
    def steps(spreads: list[float]) -> list[StepRecord]:
        found = []
        for number, spread in enumerate(spreads):
            measured = geometry(*batch(spread, number))
            assert measured is not None
            found.append(
                record(
                    number,
                    1.0,
                    uniformity=measured.uniformity,
                    effective_rank=measured.effective_rank,
                )
            )
        return found

    (text,) = said(steps([1.0] * 60 + [0.05] * 60))
    assert "the embeddings become alike: their effective rank is 2.3 and was 12.9" in text
    assert said(steps([0.01] * 120)) == []
    assert said(steps([0.05] * 60 + [1.0] * 60)) == [], "they come apart"


def test_after_a_resume_nothing_is_said_twice() -> None:
    records = [record(i, 9.0 if i == 30 else 1.0) for i in range(40)]
    resumed = DivergenceDetector()
    resumed.replay(records)
    assert said([record(41, 9.0)], resumed) == []
    fresh = DivergenceDetector()
    fresh.replay(records[:30])
    assert len(said([record(30, 9.0)], fresh)) == 1, "the steps before count"


# ---------------------------------------------------------------------- the log, and trackers


class Tracker:
    def __init__(self, name: str) -> None:
        self.name = name
        self.logged: list[tuple[dict[str, Any], int]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((values, step))


def test_the_log_keeps_every_kind_of_line_and_a_torn_one_ends_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    tracked: list[tuple[dict[str, Any], int]] = []
    board, numbers = Tracker("tensorboard"), Tracker("aim")
    answer = SampleAnswer("7", "<image> What is it?", "a mug", "ein Krug")
    evaluation = EvaluationRecord(1, {"recall@1": 1 / 3}, 0.5, (answer,))
    reporter = Reporter(
        RunLog(path, 0),
        done=0,
        total=2,
        bar=False,
        track=lambda values, step: tracked.append((values, step)),
        track_texts=lambda samples, step: track_samples([board, numbers], samples, step),
    )
    caplog.set_level(logging.INFO, "cafe.training")
    with reporter:
        reporter.step(record(1, 1.0, total=2))
        reporter.evaluation(evaluation, ["recall@1"])
        reporter.warning("warning: step 2: the loss is high", 2)
        reporter.step(record(2, 9.0, total=2))
    assert caplog.messages == [
        "evaluation after step 1: recall@1 0.3333",
        "warning: step 2: the loss is high",
    ]
    assert tracked[1] == ({"evaluation/recall@1": 1 / 3}, 1)
    assert "total" not in tracked[0][0]
    text = "**7** <image> What is it?\n\nmodel: ein Krug\n\nreference: a mug"
    assert (board.logged, numbers.logged) == ([({"samples/0": text}, 1)], [])

    path.write_bytes(path.read_bytes() + b'{"step": 3, "evaluation": {"rec')
    content = LogReader(path).read()
    assert [one.step for one in content.steps] == [1, 2] == [r.step for r in read_log(path)]
    assert content.steps[0].total == 2
    (kept,) = content.evaluations
    assert (kept.step, kept.samples, kept.seconds) == (1, (answer,), 0.5)
    assert kept.scores == pytest.approx({"recall@1": 1 / 3})
    assert content.warnings == [(2, "step 2: the loss is high")]

    RunLog(path, done=1).close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [("loss" in line, "evaluation" in line) for line in lines] == [
        (True, False),
        (False, True),
    ]


def test_names_of_measures_are_such_as_mlflow_takes() -> None:
    trackers = [Tracker("mlflow"), Tracker("wandb")]
    track_numbers(trackers, {"evaluation/recall@1": 0.5, "mteb:A(b)": 1.0}, 3)
    assert trackers[0].logged == [({"evaluation/recall_at_1": 0.5, "mteb:A_b_": 1.0}, 3)]
    assert trackers[1].logged == [({"evaluation/recall@1": 0.5, "mteb:A(b)": 1.0}, 3)]
