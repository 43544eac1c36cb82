"""Requests that schemathesis makes of our own OpenAPI, right ones and wrong ones: never a 500.

`test_fuzz.py` knows what the fields mean; this test knows only what the server says about itself,
so it also shows that what is said there is true.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cafe.index import Index, IndexRow, ModelFacts
from cafe.serving.limits import Limits
from cafe.serving.model_calls import CafeCalls
from cafe.serving.routes.search import IndexSearch
from cafe.serving.run import Server, ServerSettings
from helpers.fakes import request, wait_until

pytestmark = pytest.mark.slow

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
OPERATIONS = [
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/rerank"),
    ("POST", "/v2/rerank"),
    ("POST", "/rerank"),
    ("POST", "/v1/score"),
    ("POST", "/score"),
    ("POST", "/v1/decisions"),
    ("POST", "/v1/systemone"),
    ("POST", "/v1/responses"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/embeddings"),
    ("POST", "/pooling"),
    ("POST", "/v2/embed"),
    ("POST", "/embed"),
    ("POST", "/embed_all"),
    ("POST", "/search"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
]
BOUNDED = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def server(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The small model is random, and writes until the limit: four tokens."""
    facts = ModelFacts("small", "w", "p", small_model.embedding_dimension)
    index = Index.create(tmp_path_factory.mktemp("fuzz") / "i", facts)
    vectors = np.random.default_rng(0).normal(size=(5, facts.dimension))
    index.add([IndexRow(str(i), "text", text=f"text {i}", width=i) for i in range(5)], vectors)
    chosen = ServerSettings(
        name="small", port=0, max_wait_seconds=0.0, limits=Limits(new_tokens=4, fetch_seconds=1)
    )
    server = Server(lambda: CafeCalls(small_model), chosen, IndexSearch(index))
    server.start()
    wait_until(lambda: server.engine.loaded)
    yield server
    server.stop()


def test_every_operation_of_the_schema_is_tried(server: Server):
    paths = request(server, "/openapi.json")[1]["paths"]
    there = {(method.upper(), path) for path, one in paths.items() for method in one}
    assert there == set(OPERATIONS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_breaks_the_server(server: Server, method: str, path: str, mode: Any):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path][method]
    if mode is GenerationMode.NEGATIVE and method == "GET":
        pytest.skip("there is nothing in it that could be wrong")

    @BOUNDED
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=60)

    run()
    assert request(server, "/health")[0] == 200
