"""Marks of single cases of a test."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """Cases of `parametrize` that `make quick` leaves out; `make test` runs them all.

    For tests whose cases take about a second each and fail together: one of them is quick.
    """
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
