"""`compat: official` on two processes: half the contrastive gradient, the mean of the ranks' means.

Expected gradients are put together from runs of one process without the switch: the contrastive
loss of all pairs, and each rank's language loss by itself.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

from cafe.recipes import Objective
from helpers.official_ranks import gradients_of, shares, worker
from helpers.processes import free_port
from helpers.twin import worst_difference


@pytest.mark.slow
def test_two_processes_have_the_published_gradients(tmp_path: Path) -> None:
    port = free_port()
    multiprocessing.spawn(worker, args=(port, str(tmp_path), "official"), nprocs=2)

    everything = [example for own in shares() for example in own]
    contrastive = gradients_of(everything, Objective(language_weight=0.0))
    language = [gradients_of(own, Objective(contrastive_weight=0.0)) for own in shares()]
    published = {
        name: 0.7 * contrastive[name] / 2 + 1.3 * (language[0][name] + language[1][name]) / 2
        for name in contrastive
    }
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert worst_difference(found, published) < 1e-9
    ours = gradients_of(everything, Objective(contrastive_weight=0.7, language_weight=1.3))
    assert worst_difference(found, ours) > 0.05, "the two ways differ, or nothing was shown"
