"""The loop's pieces: groups, the rate's course, shares of a batch, log, directories, signals."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from cafe.data.quarantine import Quarantine
from cafe.errors import FamilyError, RecipeError
from cafe.model.vlm import CAFe
from cafe.recipes import Objective, Optimizer
from cafe.training import build
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.data import TrainingData, load_data, trained_part
from cafe.training.loader import Steps, step_loader, text_length
from cafe.training.log import Reporter, RunLog, StepRecord, read_log
from cafe.training.optim import (
    build_optimizer,
    freeze,
    head_is_tied,
    parts_of,
    rate_share,
    set_learning_rates,
    warmup_steps,
)
from cafe.training.stopping import StopRequest
from cafe.types import Example, Message, user
from helpers.runs import STEPS, make_world, recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def core(world: Path) -> CAFe:
    return CAFe.from_pretrained(world / "model")


@pytest.fixture(scope="module")
def data(world: Path) -> TrainingData:
    return load_data(recipe(world, world / "unused"), Quarantine())


# ---------------------------------------------------------------------- parts and groups


def test_every_parameter_is_in_one_part_and_one_group(core: CAFe) -> None:
    parts = parts_of(core)
    freeze(parts, [])
    settings = Optimizer(
        learning_rate=1e-3,
        vision_learning_rate=1e-5,
        projector_learning_rate=1e-4,
        weight_decay=0.1,
    )
    contrast = ContrastiveLoss(Objective(learn_temperature=True))
    optimizer = build_optimizer(parts, contrast, settings, "cpu")
    grouped = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    assert set(grouped.values()) == {1}
    learned = {id(p) for p in core.parameters() if p.requires_grad}
    assert set(grouped) == learned | {id(contrast.log_temperature)}
    by_name = {group["name"]: group for group in optimizer.param_groups}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in by_name.items()} == {
        "vision": (1e-5, 0.1),
        "vision, no decay": (1e-5, 0.0),
        "projector": (1e-4, 0.1),
        "projector, no decay": (1e-4, 0.0),
        "language": (1e-3, 0.1),
        "language, no decay": (1e-3, 0.0),
        "contrast": (1e-3, 0.0),
    }
    for name, group in by_name.items():
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"]), name
    set_learning_rates(optimizer, 0.5)
    assert by_name["vision"]["lr"] == 0.5e-5
    set_learning_rates(optimizer, 1.0)
    assert by_name["vision"]["lr"] == 1e-5


def test_frozen_parts_are_in_no_group(core: CAFe) -> None:
    parts = parts_of(core)
    freeze(parts, ["vision", "language"])
    optimizer = build_optimizer(
        parts, ContrastiveLoss(Objective()), Optimizer(learning_rate=1), "cpu"
    )
    assert [group["name"] for group in optimizer.param_groups] == [
        "projector",
        "projector, no decay",
    ]


@pytest.mark.parametrize(
    ("part", "prefixes", "message"),
    [
        (
            "projector",
            ("model.multi_modal_projector.",),
            "'model.image_newline' belongs to no part",
        ),
        ("vision", ("model.",), "belongs to vision and projector"),
    ],
)
def test_a_parameter_in_no_part_or_in_two_is_named(
    core: CAFe, monkeypatch: pytest.MonkeyPatch, part: str, prefixes: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(type(core.family), "parts", {**core.family.parts, part: prefixes})
    with pytest.raises(FamilyError, match=message):
        parts_of(core)


def test_a_frozen_part_does_not_wake_what_never_trains(core: CAFe) -> None:
    """The last norm of SigLIP comes after the layer that is read; DDP would wait for it."""
    parts = parts_of(core)
    freeze(parts, ["projector"])
    learned = {name for part in parts.values() for name, p in part.items() if p.requires_grad}
    assert "model.vision_tower.post_layernorm.weight" in parts["vision"]
    assert "model.vision_tower.post_layernorm.weight" not in learned
    assert "model.vision_tower.encoder.layers.0.layer_norm1.weight" in learned


def test_an_untied_head_without_a_language_loss_is_not_trained(core: CAFe) -> None:
    assert head_is_tied(core)
    core.model.lm_head = torch.nn.Linear(64, 10, bias=False)
    assert not head_is_tied(core)


# ---------------------------------------------------------------------- the rate's course


def course(steps: int, warmup: float | int, kind: str) -> list[float]:
    count = warmup_steps(warmup, steps)
    return [rate_share(done, steps=steps, warmup=count, kind=kind) for done in range(steps)]


def test_courses_have_their_closed_forms() -> None:
    assert course(4, 0, "constant") == [1, 1, 1, 1]
    assert course(4, 0, "linear") == [1, 0.75, 0.5, 0.25]
    assert course(4, 0, "cosine") == pytest.approx(
        [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )
    assert course(6, 2, "linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rate_share(6, steps=6, warmup=2, kind="cosine") == 0  # after the last


def test_warmup_is_a_share_or_a_number_of_steps() -> None:
    assert warmup_steps(0.03, 1000) == 30
    assert warmup_steps(0.03, 10) == 0
    assert warmup_steps(1, 10) == 1
    assert warmup_steps(50, 10) == 10


# ---------------------------------------------------------------------- shares of a batch


def ids(steps: Steps, step: int) -> list[str]:
    return [name for chunk in steps[step].chunks for name in chunk.ids]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_shares_of_all_ranks_are_the_batch(core: CAFe, data: TrainingData, ranks: int) -> None:
    for step in range(STEPS):
        planned = sorted(data.examples[index].id for index in data.plan.plan(step))
        shares = [Steps(data, core.collator, 2, rank, ranks) for rank in range(ranks)]
        assert sorted(name for share in shares for name in ids(share, step)) == planned


def test_an_epoch_has_every_example_once_in_chunks_of_like_length(
    core: CAFe, data: TrainingData
) -> None:
    steps = Steps(data, core.collator, 3)
    length = {e.id: text_length(e) for e in (data.examples[i] for i in range(len(data.examples)))}
    seen: Counter[str] = Counter()
    for step in range(STEPS):
        assert [len(chunk.ids) for chunk in steps[step].chunks] == [3, 1]
        seen.update(ids(steps, step))
        lengths = [length[name] for name in ids(steps, step)]
        assert lengths == sorted(lengths)
    assert set(seen.values()) == {1}
    assert len(seen) == 32


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_loader_begins_at_any_step_and_keeps_the_order(
    core: CAFe, data: TrainingData, workers: int
) -> None:
    steps = Steps(data, core.collator, 2)
    state = torch.get_rng_state()
    loaded = list(step_loader(steps, 3, 7, workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert [[name for chunk in item.chunks for name in chunk.ids] for item in loaded] == [
        ids(steps, step) for step in range(3, 7)
    ]


def test_what_a_zero_weight_makes_idle_is_not_even_collated() -> None:
    dialogue = (*user("a"), Message("assistant", ("b",)))
    pair = Example("pair", query=user("a"), target=user("b"))
    answer = Example("answer", dialogues=(dialogue,))
    both = Example("both", query=user("a"), target=user("b"), dialogues=(dialogue,), target_id="b")
    joint = Objective()
    embeddings, answers = Objective(language_weight=0), Objective(contrastive_weight=0)
    assert [trained_part(e, joint) for e in (pair, answer, both)] == [pair, answer, both]
    assert trained_part(answer, embeddings) is None
    assert trained_part(pair, answers) is None
    assert trained_part(pair, embeddings) == pair
    kept = trained_part(both, embeddings)
    assert kept is not None
    assert (kept.query, kept.dialogues) == (both.query, ())
    kept = trained_part(both, answers)
    assert kept is not None
    assert (kept.query, kept.dialogues, kept.target_id) == (None, both.dialogues, "b")


# ---------------------------------------------------------------------- log


def record(step: int, **values: Any) -> StepRecord:
    numbers = {"loss": 3.0, "contrastive": 1.0, "language": 2.0, "gradient_norm": 1.5}
    rates = {"examples_per_second": 4.0, "tokens_per_second": 5.0, "learning_rate": 0.1}
    clock = {"data_wait_share": 0.5, "seconds": 0.25}
    return StepRecord(step, **{**numbers, **rates, **clock, **values})


def test_a_resumed_log_has_each_step_once_even_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path, done=0)
    for step in range(1, 5):
        log.append(record(step))
    log.close()
    path.write_bytes(path.read_bytes() + b'{"step": 5, "lo')
    assert [r.step for r in read_log(path)] == [1, 2, 3, 4]
    log = RunLog(path, done=2)
    log.append(record(3, loss=9.0, temperature=0.05))
    log.close()
    assert [(r.step, r.loss) for r in read_log(path)] == [(1, 3.0), (2, 3.0), (3, 9.0)]
    assert read_log(path)[-1] == record(3, loss=9.0, temperature=0.05)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_names_the_log_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl", done=0)
    log._file.close()
    log._file = Path("/dev/full").open("a")  # noqa: SIM115 (the log closes it)
    with pytest.raises(OSError, match=r"No space left on device: '.*/log\.jsonl'"):
        log.append(record(1))
    log.close()


def test_the_reporter_logs_every_so_many_steps_and_the_last_and_tracks_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tracked: list[tuple[dict[str, Any], int]] = []
    path = tmp_path / "log.jsonl"
    reporter = Reporter(
        RunLog(path, 0),
        done=0,
        total=5,
        every_steps=2,
        track=lambda values, step: tracked.append((values, step)),
    )
    with reporter:
        for step in range(1, 6):
            reporter.step(record(step))
        reporter.message("a [message] stays as it is")
    assert [r.step for r in read_log(path)] == [2, 4, 5]
    assert [step for _, step in tracked] == [2, 4, 5]
    assert "temperature" not in tracked[0][0]
    assert tracked[0][0]["loss"] == 3.0
    assert caplog.messages == ["a [message] stays as it is"]
    assert capsys.readouterr().err == "", "the program decides what becomes of messages"


def test_a_terminal_shows_losses_rates_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "160", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    with Reporter(RunLog(tmp_path / "log.jsonl", 0), done=0, total=5) as reporter:
        reporter.step(record(1))
    shown = capsys.readouterr().err
    for text in ("loss 3.000 (contrastive 1.000, language 2.000)", "4.0 examples/s", "left"):
        assert text in shown


# ---------------------------------------------------------------------- signals


def test_a_second_ctrl_c_does_not_wait() -> None:
    import signal

    # A shell starts background jobs with SIGINT ignored; the usual handler is put in first.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal_number == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # the usual handler is back
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_manifest_is_the_last_file_of_a_checkpoint(world: Path, tmp_path: Path) -> None:
    from cafe.training.run import train

    out = tmp_path / "out"
    train(recipe(world, out, "schedule.steps=1"))
    folder = out / "checkpoints" / "step-000001"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 1
    assert manifest["files"] == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.suffix != ".json"
    }


# ---------------------------------------------------------------------- processes


def test_processes_that_accelerate_does_not_join_are_an_error(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would train on its share alone, and write over the other's files."""
    monkeypatch.setattr(build, "world_size", lambda: 2)
    with pytest.raises(RecipeError, match="2 processes were started, but accelerate cannot join"):
        build.build_accelerator(recipe(world, tmp_path / "out"))
