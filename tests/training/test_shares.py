"""Any batch, chunk and number of processes has the gradients of one, and ends.

Shares of a batch may be unequal numbers of chunks, or no example at all. Every combination of
`cases` is trained by real processes (gloo, CPU, float64), wrapped (DDP) and sharded (FSDP).
"""

from __future__ import annotations

import shutil
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from helpers.share_ranks import CASES, STEPS, cases, of_one_process, share, worker
from helpers.twin import worst_difference

PATIENCE_SECONDS = 240
"""Without news from any process. What hangs fails."""


def run_ranks(ranks: int, sharded: bool, out: Path) -> None:
    group = spawn(worker, (ranks, sharded, str(out)), nprocs=ranks, join=False)
    assert group is not None
    done, since = 0, time.monotonic()
    while not group.join(timeout=1):
        if (now := len([*out.glob("*.pt")])) > done:
            done, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE_SECONDS:
            for process in group.processes:
                process.kill()
            pytest.fail(
                f"{ranks} processes hang after {done} of {len(cases(sharded)) * ranks} findings"
            )


@cache
def expected(batch: int) -> list[dict[str, Any]]:
    return of_one_process(batch)


def assert_same(found: dict[str, Any], one: dict[str, Any], *, whole: bool) -> None:
    if whole:
        assert worst_difference(found["gradients"], one["gradients"]) < 1e-9
    torch.testing.assert_close(found["temperature"], one["temperature"])
    torch.testing.assert_close(found["losses"], one["losses"], check_dtype=False)
    assert found["counts"] == one["counts"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_batch_and_chunk_has_the_gradients_of_one_process(
    ranks: int, sharded: bool, tmp_path: Path
) -> None:
    if ranks == 1 and sharded:
        pytest.skip("one process has nothing to share")
    try:
        run_ranks(ranks, sharded, tmp_path)
    except ProcessExitedException as crash:
        # Now and then a thread of gloo crashes when more processes than cores start and end.
        # Once more, so that a crash of ours, which would come again, still fails.
        if crash.signal_name is None:
            raise
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        run_ranks(ranks, sharded, tmp_path)
    for batch, chunk in cases(sharded):
        for rank in range(ranks):
            steps = torch.load(tmp_path / f"{batch}-{chunk}-{rank}.pt")
            assert len(steps) == STEPS
            for step, one in zip(steps, expected(batch), strict=True):
                assert_same(step, one, whole=not sharded or rank == 0)


def test_the_shares_are_as_unequal_as_can_be(small_model: Any) -> None:
    """Or the test above would show less than it says."""
    for batch, chunk, ranks in [(5, 2, 2), (9, 4, 2), (9, 2, 4)]:
        shares = [share(small_model, batch, chunk, rank, ranks) for rank in range(ranks)]
        counts = [{len(steps[step].chunks) for steps in shares} for step in range(STEPS)]
        assert {1, 2} in counts, (batch, chunk, ranks)
    none_left = [share(small_model, 3, 1, rank, 4)[0].chunks[0] for rank in range(4)]
    assert sum(chunk.pairs for chunk in none_left) <= 3
    assert sum(chunk.pairs == chunk.label_count == 0 for chunk in none_left) >= 1


def test_one_process_learns_something_in_every_case() -> None:
    for batch, _ in CASES:
        norms = [float(g.norm()) for step in expected(batch) for g in step["gradients"].values()]
        assert sum(norm > 0 for norm in norms) > 20
