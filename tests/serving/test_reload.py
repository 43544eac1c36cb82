"""An index that changes on disk is served as it is there, without a restart."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cafe.index import Index, IndexRow, ModelFacts
from cafe.serving.routes.search import IndexSearch
from cafe.serving.run import Server, ServerSettings
from helpers.fakes import DIMENSION, Fake, request, vector, wait_until


def make(uri: Path, texts: list[str], model: str = "fake") -> Index:
    index = Index.create(uri, ModelFacts(model, model, "p", DIMENSION))
    rows = [IndexRow(text, "text", text=text) for text in texts]
    index.add(rows, np.stack([vector(text) for text in texts]))
    return index


def found(server: Server, query: str) -> list[str]:
    status, reply, _ = request(server, "/search", {"query": query, "top": 9})
    assert status == 200, reply
    return [hit["id"] for hit in reply["hits"]]


@pytest.fixture
def serve() -> Iterator[Any]:
    servers: list[Server] = []

    def begin(uri: Path, **settings: Any) -> Server:
        search = IndexSearch(Index.open(uri))
        chosen = ServerSettings(**{"name": "fake", "port": 0} | settings)
        servers.append(Server(Fake, chosen, search))  # type: ignore[arg-type]
        servers[-1].start()
        wait_until(lambda: servers[-1].engine.loaded)
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()


def test_rows_that_are_added_are_found(serve: Any, tmp_path: Path):
    index = make(tmp_path / "i", ["cat", "dog"])
    server = serve(tmp_path / "i")
    assert sorted(found(server, "dog")) == ["cat", "dog"]
    index.add([IndexRow("mug", "text", text="mug")], vector("mug")[None])
    wait_until(lambda: found(server, "mug")[0] == "mug")


def test_an_index_that_is_made_again_is_searched_at_once(serve: Any, tmp_path: Path):
    make(tmp_path / "i", ["cat", "dog"])
    server = serve(tmp_path / "i")
    assert "cat" in found(server, "cat")
    shutil.rmtree(tmp_path / "i")
    make(tmp_path / "i", ["sun"])
    wait_until(lambda: found(server, "sun") == ["sun"])


def test_an_index_of_another_model_is_not_searched(serve: Any, tmp_path: Path):
    make(tmp_path / "i", ["cat"])
    server = serve(tmp_path / "i")
    assert found(server, "cat") == ["cat"]
    shutil.rmtree(tmp_path / "i")
    make(tmp_path / "i", ["sun"], model="another")
    wait_until(lambda: request(server, "/search", {"query": "sun"})[0] == 503)
    reply = request(server, "/search", {"query": "sun"})[1]
    assert reply["error"]["code"] == "index_replaced"


# ---------------------------------------------------------------------- ids and the access log


def test_every_answer_has_an_id_and_the_log_names_it(
    serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    make(tmp_path / "i", ["secret"])
    server = serve(tmp_path / "i", access_log=True)
    caplog.set_level(logging.INFO, "cafe.serving.access")
    caplog.clear()
    own = {"X-Request-ID": "trace-1:a.b_c"}
    for path, body, status in [
        ("/search", {"query": "secret words"}, 200),
        ("/search", {}, 400),
        ("/health", None, 200),
        ("/secret", None, 404),
    ]:
        got, _, headers = request(server, path, body, headers=own)
        assert (got, headers["x-request-id"]) == (status, "trace-1:a.b_c")
    for odd in ("a b", "", "x" * 129, '"}'):
        headers = request(server, "/health", headers={"X-Request-ID": odd})[2]
        assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
    wait_until(lambda: len(caplog.messages) == 8)
    lines = [json.loads(line) for line in caplog.messages]
    assert [(one["route"], one["status"]) for one in lines[:4]] == [
        ("/search", 200),
        ("/search", 400),
        ("/health", 200),
        ("other", 404),
    ]
    assert {one["request_id"] for one in lines[:4]} == {"trace-1:a.b_c"}
    assert set(lines[0]) == {
        *("time", "request_id", "method", "route", "status", "seconds", "bytes")
    }
    assert lines[0]["bytes"] > 0
    assert "secret" not in caplog.text


def test_requests_are_not_logged_unasked(
    serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    make(tmp_path / "i", ["cat"])
    server = serve(tmp_path / "i")
    caplog.set_level(logging.INFO, "cafe.serving.access")
    found(server, "cat")
    assert caplog.messages == []
