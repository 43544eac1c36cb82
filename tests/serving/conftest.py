"""The bundled model and a server of it, for the tests that speak to the real one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from helpers.fakes import started


@pytest.fixture(scope="module")
def tiny() -> Any:
    from cafe.model.vlm import CAFe

    return CAFe.from_pretrained("tiny")


@pytest.fixture(scope="module")
def server(tiny: Any) -> Iterator[Any]:
    """Files with a server of their own kind override it."""
    from cafe.serving.model_calls import CafeCalls

    server = started(CafeCalls(tiny), name="tiny")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=120)
