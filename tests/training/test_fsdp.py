"""Sharded training on two processes (gloo, CPU) has the gradients of one, and its runs resume."""

from __future__ import annotations

import filecmp
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file

from cafe.errors import RecipeError
from cafe.training.checkpoints import complete
from cafe.training.run import train
from cafe.training.saving import kept_step
from helpers.fsdp_ranks import CASES, norm_of, share, step_of, worker
from helpers.processes import PATIENCE_SECONDS, free_port, wait_while_running
from helpers.runs import (
    Killed,
    die_after,
    equal,
    make_world,
    moved,
    one_thread,
    recipe,
    recipe_file,
    weights,
    without_times,
)
from helpers.twin import gradients, worst_difference


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both ranks found in every case."""
    folder = tmp_path_factory.mktemp("steps")
    multiprocessing.spawn(worker, args=(free_port(), str(folder)), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_sharded_processes_have_the_gradients_of_one(name: str, steps: Path) -> None:
    model, contrast, numbers = step_of(CASES[name], -1)
    norm = norm_of(model, contrast)
    model, contrast, numbers = step_of(CASES[name], -1)
    expected = gradients(model)
    assert sum(float(g.norm()) > 0 for g in expected.values()) > 20
    for rank in (0, 1):
        found = torch.load(steps / f"{name}-{rank}.pt")
        if rank == 0:
            assert worst_difference(found["gradients"], expected) < 1e-9
        torch.testing.assert_close(found["temperature"], contrast.log_temperature.grad)
        torch.testing.assert_close(found["losses"], (numbers.contrastive, numbers.language))
        assert found["counts"] == (numbers.tokens, numbers.pairs)
        assert found["norm"] == pytest.approx(norm, rel=1e-5)
        whole = max(p.numel() for p in model.parameters())
        assert found["largest piece"] == whole // 2, "nothing was sharded"


@pytest.mark.slow
def test_a_sharded_adapter_is_consolidated_as_the_whole_one_is_saved(
    steps: Path, tmp_path: Path
) -> None:
    model, _, _ = step_of(CASES["lora"], -1)
    model.save_pretrained(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors", "processor_config.json"):
        assert (steps / "saved lora" / name).read_bytes() == (tmp_path / name).read_bytes(), name


@pytest.mark.slow
def test_a_sharded_model_with_token_vectors_is_saved_as_the_whole_one(
    steps: Path, tmp_path: Path
) -> None:
    model, _, _ = step_of(CASES["token vectors"], -1)
    model.save_pretrained(tmp_path)
    for name in ("model", "multi_vector/1_Dense/model"):
        saved = [
            load_file(d / f"{name}.safetensors") for d in (steps / "saved token vectors", tmp_path)
        ]
        assert equal(*saved), name


@pytest.mark.slow
def test_pieces_come_back_bit_for_bit(steps: Path) -> None:
    for rank in (0, 1):
        found = torch.load(steps / f"restored-{rank}.pt")
        assert all(found.values()), found


def test_the_shares_are_what_the_names_of_the_cases_say(small_model: Any) -> None:
    """Or the test above would not show that no rank waits for another."""
    assert [len(share(rank)) for rank in (0, 1, -1)] == [4, 6, 10]
    assert [e.id for e in (*share(0), *share(1))] == [e.id for e in share(-1)]
    no_pair, no_image = (small_model.collator(share(1)[i : i + 2]) for i in (2, 4))
    assert no_pair.pairs == 0
    assert no_pair.embedding_rows.input_ids.numel() == 0
    assert not no_image.vision
    assert no_image.pairs == 2


# ---------------------------------------------------------------------- whole runs

STEADY = (
    "batch.examples=5",
    "batch.chunk=1",  # 2 and 3 chunks on two processes
    "schedule.kind=constant",
    "schedule.warmup=0",
    "checkpoint.every_steps=1",
)
SHARDED = (*STEADY, "sharding=fsdp")
EVALUATED = ("evaluate.every_steps=1", "evaluate.held_out=9", "evaluate.samples=0")
EVALUATED += ("checkpoint.best=language_loss",)


def torchrun(*arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return [*launcher, "--master-port", str(free_port()), "-m", "cafe", "train", *arguments]


def accelerate(*arguments: str) -> list[str]:
    """Without GPUs it takes its simple launcher, which starts one process, unless told this."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launcher += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    return [*launcher, "-m", "cafe", "train", *arguments]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def rank_processes(launcher: int) -> dict[int, int]:
    """Rank -> process id, of a launcher's children."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(v[5:]): int(child) for v in environment if v.startswith(b"RANK=")}
    return found


def steps_saved(out: Path) -> list[int]:
    return [step for step, _ in complete(out / "checkpoints")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def assert_same_run(world: Path, one: Path, other: Path) -> None:
    """The same log and weights but for sums in another order, through a few steps of Adam."""
    for a, b in zip(without_times(one), without_times(other), strict=True):
        for line in (a, b):  # the killed run was to be longer; evaluations do not say it
            line.pop("total", None)
        assert b == pytest.approx(a, rel=1e-3)
    assert moved(weights(world), weights(one), "") > 1e-3
    assert moved(weights(one), weights(other), "") < 2e-4


@pytest.mark.slow
def test_a_rank_dies_the_other_ends_with_a_message_and_one_process_goes_on(
    world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    arguments = (str(recipe_file(world, out)), *SHARDED, "schedule.steps=400")
    process = start(torchrun(*arguments))
    wait_while_running(process, lambda: len(steps_saved(out)) == 2)
    ranks = rank_processes(process.pid)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    begin = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begin < 60
    assert process.returncode != 0
    told = next(line for line in errors.splitlines() if line.startswith("error: "))
    assert (
        "process 0 of 2 ends, because another process of this run ended or does not answer" in told
    )
    assert told.endswith(f"resume with: cafe train {out}/recipe.yaml --resume")

    (last, newest) = complete(out / "checkpoints")[-1]
    files = {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()}
    assert {"pieces/__0_0.distcp", "pieces/__1_0.distcp"} <= files
    assert "weights.safetensors" not in files
    shutil.copytree(out, tmp_path / "copy")

    length = f"schedule.steps={last + 2}"
    with one_thread():
        train(recipe(world, tmp_path / "one", *STEADY, length))
        train(recipe(world, out, *SHARDED, length), resume=True)
    assert_same_run(world, tmp_path / "one", out)
    assert (complete(out / "checkpoints")[-1][1] / "weights.safetensors").is_file()

    # The same pieces, read by two processes that do not shard.
    out = tmp_path / "copy"
    process = start(torchrun(str(recipe_file(world, out)), *STEADY, length, "--resume"))
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    assert_same_run(world, tmp_path / "one", out)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_sharded_over_two_and_consolidates(
    world: Path, tmp_path: Path
) -> None:
    out, length = tmp_path / "out", ("schedule.steps=4", *EVALUATED)
    with one_thread():
        train(recipe(world, tmp_path / "one", *STEADY, *length))
        with pytest.raises(Killed):
            train(recipe(world, out, *SHARDED, *length), on_step=die_after(3))
    assert steps_saved(out) == [1, 2]
    process = start(accelerate(str(recipe_file(world, out)), *SHARDED, *length, "--resume"))
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    assert_same_run(world, tmp_path / "one", out)
    assert (complete(out / "checkpoints")[-1][1] / "pieces").is_dir()
    names = [p.relative_to(tmp_path / "one") for p in (tmp_path / "one" / "model").rglob("*.*")]
    for name in names:
        if name.suffix != ".safetensors":
            assert (out / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    assert kept_step(out / "best") == 4
    assert filecmp.cmp(
        out / "best" / "model.safetensors", out / "model" / "model.safetensors", False
    )
    dtypes = {t.dtype for t in load_file(out / "model" / "model.safetensors").values()}
    assert dtypes == {torch.float32}


def test_accelerates_own_fsdp_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    monkeypatch.setattr(
        "cafe.training.build.Accelerator.distributed_type", DistributedType.FSDP, raising=False
    )
    with pytest.raises(RecipeError, match=r"leave it off .* and set sharding=fsdp in the recipe"):
        train(recipe(world, tmp_path / "out"))
    AcceleratorState._reset_state()
