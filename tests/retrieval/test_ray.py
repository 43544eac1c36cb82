"""What a worker of Ray gets of the cluster."""

from __future__ import annotations

from typing import Any

import pytest

from cafe.retrieval.ray import shares


@pytest.mark.parametrize(
    ("resources", "workers", "expected"),
    [
        ({"CPU": 16}, None, (1, {"num_cpus": 16})),
        ({"CPU": 16}, 5, (5, {"num_cpus": 3})),
        ({"CPU": 2}, 4, (4, {"num_cpus": 1})),
        ({"CPU": 16, "GPU": 8}, None, (8, {"num_gpus": 1.0})),
        ({"CPU": 16, "GPU": 8}, 4, (4, {"num_gpus": 1.0})),
        ({"CPU": 16, "GPU": 1}, 2, (2, {"num_gpus": 0.5})),
    ],
)
def test_each_worker_has_a_gpu_or_its_part_of_the_cpus(
    resources: dict[str, float], workers: int | None, expected: Any
) -> None:
    assert shares(resources, workers) == expected
