"""The middleware: keys, hosts, sizes, queues, clients that disconnect."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest

from cafe.errors import CafeError, ImageError
from cafe.serving.limits import Limits, too_many
from cafe.serving.page.turns import find_hits
from cafe.serving.routes.search import IndexSearch
from cafe.serving.run import Server, ServerSettings, check_exposure, loopback_hosts
from helpers.fakes import DIMENSION, Fake, chat, data_uri, request, started, vector, wait_until
from helpers.images import noise
from helpers.serving import LIMITS, bomb, message, serving, waiting


@pytest.fixture(scope="module")
def model() -> Fake:
    return Fake()


@pytest.fixture(scope="module")
def server(model: Fake) -> Iterator[Server]:
    with serving(model, limits=LIMITS, max_queue=4) as server:
        yield server


def image(width: int = 20, height: int = 10) -> str:
    return data_uri(PIL.Image.new("RGB", (width, height), "red"))


def shows(*urls: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": parts}]}


# ---------------------------------------------------------------------- keys and hosts


def test_the_right_key_and_no_other_opens():
    with serving(Fake(), api_key="a-secret") as server:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "a-secret"}):
            status, reply, headers = request(
                server, "/v1/embeddings", {"input": "a"}, headers=header
            )
            assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert request(server, path)[0] == 401, path
        for path in ("/health", "/ready"):
            assert request(server, path)[0] == 200, path
        right = {"Authorization": "bearer a-secret"}
        assert request(server, "/v1/embeddings", {"input": "a"}, headers=right)[0] == 200
        other_host = right | {"Host": "cafe.example.com"}
        assert request(server, "/v1/models", headers=other_host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example.com", "evil.example.com:8000", "", "127.0.0.1.a.com"]
)
def test_a_browser_that_calls_loopback_by_another_name_is_refused(server: Server, host: str):
    status, reply, _ = request(server, "/v1/models", headers={"Host": host})
    assert status == 403
    assert "is not a name of this server" in message(reply)


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]", "[::1]:80"]
)
def test_loopback_by_its_own_names_is_served(server: Server, host: str):
    assert request(server, "/v1/models", headers={"Host": host})[0] == 200


def test_an_open_host_wants_a_key():
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        with pytest.raises(CafeError, match="--api-key"):
            check_exposure(host, None)
        check_exposure(host, "key")
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        check_exposure(host, None)
    with pytest.raises(CafeError, match="empty"):
        check_exposure("127.0.0.1", "")
    assert "[::1]" in loopback_hosts("::1")


def test_a_taken_port_is_told(server: Server):
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(CafeError, match=f"port {port}"):
        started(Fake(), port=port)


# ---------------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    "body", [b"{", b"", b"\xff\xfe", b"nonsense", b"[" * 100_000, b'{"input": NaN}', b"9" * 5000]
)
def test_what_is_not_json_is_refused(server: Server, body: bytes):
    status, reply, _ = request(server, "/v1/embeddings", body)
    assert status == 400
    assert reply["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"{" + b",".join(b'"k%d":1' % i for i in range(100_000)) + b"}",
        b'{"messages": [' + b",".join([b'{"role":"user"}'] * 60_000) + b"]}",
        b'{"input": [' + b"," * 1_100_000 + b"1]}",
        b'{"input": "a", ' + b",".join(b'"k%d":1' % i for i in range(200)) + b"}",
    ],
)
def test_a_body_of_very_many_fields_or_values_is_refused(server: Server, body: bytes):
    status, reply, _ = request(server, "/v1/embeddings", body)
    assert status == 400
    assert "more than" in message(reply)


@pytest.mark.parametrize("text", [":" * 300_000, '":,' * 300_000, "\\" * 300_000 + ":" * 60_000])
def test_text_may_have_any_number_of_signs(text: str):
    assert too_many(json.dumps({"input": text}).encode()) is None


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "body", [b'"' + b'\\"' * 2_000_000, b":" * 60_000 + b'"' * 2_000_001, b"\\:" * 1_000_000]
)
def test_what_is_no_json_is_counted_in_linear_time(body: bytes):
    too_many(b":" * 60_000 + body)
    too_many(body + b":" * 60_000)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_a_form_of_a_web_page_is_refused(server: Server, kind: str):
    """A browser sends these to any address without asking first."""
    body = json.dumps({"input": "a"}).encode()
    assert request(server, "/v1/embeddings", body, headers={"Content-Type": kind})[0] == 400


def test_a_large_body_is_refused_and_not_kept(server: Server):
    body = b'{"input": "' + b"a" * 50_000_000
    begin = resident_bytes()
    assert request(server, "/v1/embeddings", b"a" * 2_000_001)[0] == 413
    with closing(server) as sock:  # more than is read and thrown away
        sock.sendall(head(len(body)))
        reply = send_until_answered(sock, body)
    assert reply.startswith(b"HTTP/1.1 413")
    assert resident_bytes() - begin < 60_000_000
    assert request(server, "/v1/embeddings", {"input": "a"})[0] == 200


def test_a_body_that_is_announced_is_refused_before_it_is_sent(server: Server):
    with closing(server) as sock:
        lines = b"Authorization: none\r\nExpect: 100-continue\r\nHost: evil.example.com\r\n"
        sock.sendall(b"POST /v1/embeddings HTTP/1.1\r\nContent-Length: 1000\r\n" + lines + b"\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 403")


def test_a_body_that_comes_too_slowly_is_refused():
    with (
        serving(Fake(), limits=Limits(read_seconds=0.3)) as server,
        closing(server) as sock,
    ):
        sock.sendall(head(100) + b"{")
        assert sock.recv(1000).startswith(b"HTTP/1.1 408")


def test_bodies_that_wait_are_bounded_together():
    limits = Limits(body_bytes=1000, held_body_bytes=1500)
    with serving(Fake(), limits=limits) as server:
        with closing(server) as sock:
            sock.sendall(head(1000) + b"a" * 900)
            wait_until(lambda: request(server, "/v1/embeddings", b"a" * 800)[0] == 429)
        wait_until(lambda: request(server, "/v1/embeddings", b"a" * 800)[0] == 400)


def test_who_has_no_key_takes_nothing_from_those_who_have():
    limits = Limits(body_bytes=100_000, held_body_bytes=100_000, read_seconds=300)
    key = {"Authorization": "Bearer a-secret"}
    paths = (b"health", b"ready", b"v1/embeddings", b"ui/login")
    with serving(Fake(), limits=limits, api_key="a-secret") as server, ExitStack() as held:
        for path in paths * 4:
            sock = held.enter_context(closing(server))
            sock.sendall(head(90_000).replace(b"v1/embeddings", path) + b"a" * 80_000)
        for _ in range(20):
            body = {"input": "a" * 60_000}
            assert request(server, "/v1/embeddings", body, headers=key)[0] == 200
        # The last answer can be read before its request is counted as ended; a body that never
        # comes is held for far longer than is waited for here.
        wait_until(server.drain)


def test_a_probe_may_have_a_small_body(server: Server):
    assert request(server, "/health", b"{}", method="GET")[0] == 200
    assert request(server, "/health", b"a" * 5000, method="GET")[0] == 413


def head(length: int) -> bytes:
    return (
        b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % length
    )


def closing(server: Server) -> socket.socket:
    """A connection; leaving it hangs up."""
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30)


def send_until_answered(sock: socket.socket, body: bytes) -> bytes:
    try:
        sock.sendall(body)
    except OSError:
        return b"HTTP/1.1 413 (the server hung up)"
    return sock.recv(1000)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


# ---------------------------------------------------------------------- contents


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "etc/passwd",
        "C:\\secret.png",
        "ftp://example.com/a.png",
        "data:text/plain;base64,aGVsbG8=",
        "data:image/png,hello",
        "data:image/png;base64,***",
        "data:image/png;base64,aGVsbG8=",
        "",
    ],
)
def test_only_images_inside_the_request_are_read(server: Server, url: str):
    for body in (shows(url), {"query": "a", "documents": [{"image": url}]}):
        path = "/v1/rerank" if "query" in body else "/v1/embeddings"
        status, reply, _ = request(server, path, body)
        assert status == 400
        assert "root" not in message(reply), "that is what stands in /etc/passwd"


@pytest.mark.parametrize("url", ["http://8.8.8.8/a.png", "HTTPS://example.com/a.png"])
def test_remote_images_are_refused_unless_allowed(server: Server, url: str):
    status, reply, _ = request(server, "/v1/embeddings", shows(url))
    assert (status, "not allowed" in message(reply)) == (400, True)


def test_allowed_remote_images_are_never_fetched_from_inside():
    asked = threading.Event()

    def inside() -> None:
        connection, _ = listener.accept()
        asked.set()
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=inside, daemon=True).start()
        port = listener.getsockname()[1]
        with serving(Fake(), allow_remote_images=True) as server:
            for url in (f"http://127.0.0.1:{port}/", f"http://localhost:{port}/", "http://[::1]/"):
                status, reply, _ = request(server, "/v1/embeddings", shows(url))
                assert (status, "refused" in message(reply)) == (400, True)
        assert not asked.is_set()


def test_images_are_bounded(server: Server):
    for body, reason in [
        (shows(image(101, 100)), "10100 pixels|101x100"),
        (shows(*[image()] * 3), "more than 2 images"),
        (shows(image(100, 100), image(100, 100)), "15,000 pixels"),
        (shows(bomb(60_000, 60_000)), "decompression bomb"),
        (shows(bomb(9_000, 9_000)), "9000x9000"),
    ]:
        status, reply, _ = request(server, "/v1/embeddings", body)
        assert status == 400
        assert any(word in message(reply) for word in reason.split("|")), message(reply)
    assert request(server, "/v1/embeddings", shows(image(100, 100)))[0] == 200


def test_broken_images_are_refused(server: Server):
    whole = base64.b64decode(image(90, 90).partition(",")[2])
    buffer = io.BytesIO()
    noise(0, 90, 90).save(buffer, "jpeg")
    for content in (whole[:60], buffer.getvalue()[:1000], b"%!PS-Adobe-3.0 EPSF-3.0\n", b""):
        url = "data:image/png;base64," + base64.b64encode(content).decode()
        status, reply, _ = request(server, "/v1/embeddings", shows(url))
        assert (status, reply["error"]["code"]) == (400, "invalid_image"), message(reply)


def test_an_image_that_is_costly_to_decode_is_refused(server: Server):
    scan = b"\xff\xda\0\x08\x01\x01\0\x01\x3f\0"
    url = "data:image/jpeg;base64," + base64.b64encode(b"\xff\xd8" + scan * 101).decode()
    status, reply, _ = request(server, "/v1/embeddings", shows(url))
    assert (status, reply["error"]["code"]) == (400, "invalid_image")
    assert "more than 100 scans" in message(reply)


def test_texts_do_not_wait_for_images_to_be_decoded(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    go_on, begun = threading.Event(), threading.Event()

    def slow(*_: Any, **__: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        raise ImageError("at last")

    monkeypatch.setattr("cafe.serving.content.open_image", slow)
    ask = [
        threading.Thread(target=request, args=(server, "/v1/embeddings", shows(image())))
        for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        for thread in ask:
            thread.start()
        assert begun.wait(20)
        others = threading.Thread(target=request, args=(server, "/v1/embeddings", {"input": "a"}))
        others.start()
        others.join(10)
        assert not others.is_alive()
    finally:
        go_on.set()
        for thread in ask:
            thread.join(20)


def test_pixels_that_wait_are_bounded_together(server: Server, model: Fake):
    with waiting(server, model, shows(image(100, 100)), shows(image(100, 100))):
        status, reply, headers = request(server, "/v1/embeddings", shows(image(100, 100)))
        assert (status, "pixels" in message(reply)) == (429, True)
        assert int(headers["retry-after"]) >= 1
    assert request(server, "/v1/embeddings", shows(image(100, 100)))[0] == 200


def test_texts_are_bounded(server: Server):
    for body, reason in [
        ({"input": "a" * 1001}, "1,001 characters"),
        ({"input": ["a" * 800, "b" * 800]}, "1,500 characters"),
        ({"input": ["a"] * 6}, "6 exceed the limit of 5"),
        ({"messages": [chat("a")["messages"]] * 6}, "6 exceed the limit of 5"),
    ]:
        status, reply, _ = request(server, "/v1/embeddings", body)
        assert (status, reason in message(reply)) == (400, True), message(reply)
    status, reply, _ = request(server, "/v1/chat/completions", chat("a", max_tokens=501))
    assert (status, reply["error"]["param"]) == (400, "max_tokens")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": "a", "messages": chat("a")["messages"]}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": 3}, "input"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "dimensions": DIMENSION + 1}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "late_chunking": True}, "late_chunking"),
        ("/v1/embeddings", {"input": "\ud800"}, "input"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", chat("a", n=17), "n"),
        ("/v1/chat/completions", chat("a", tools=[{}]), "tools.0.type"),
        ("/v1/chat/completions", chat("a", temperature=3), "temperature"),
        ("/v1/chat/completions", chat("a", temperature="hot"), "temperature"),
        ("/v1/chat/completions", chat("a", max_tokens=0), "max_tokens"),
        ("/v1/chat/completions", chat("a", stop=["a"] * 5), "stop"),
        ("/v1/chat/completions", {"messages": [{"role": "cat", "content": ""}]}, "messages.0.role"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.image_url",
        ),
        ("/v1/rerank", {"query": "a"}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": [{}]}, "documents.0"),
    ],
)
def test_a_wrong_field_is_named(server: Server, path: str, body: Any, param: str):
    status, reply, _ = request(server, path, body)
    assert (status, reply["error"]["param"]) == (400, param), reply
    assert message(reply)


def test_tokens_of_another_vocabulary_are_refused_with_the_reason(server: Server):
    for ids, param in ([1, 256], "input"), ([[1], [2, 100_000]], "input.1"):
        status, reply, _ = request(server, "/v1/embeddings", {"input": ids})
        assert (status, reply["error"]["param"]) == (400, param)
        assert "not in the model's vocabulary of 256: use" in message(reply)
    status, reply, _ = request(server, "/v1/embeddings", {"input": [1] * 1001})
    assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")


def test_another_models_name_is_not_found(server: Server):
    status, reply, _ = request(server, "/v1/embeddings", {"model": "gpt", "input": "a"})
    assert (status, reply["error"]["code"]) == (404, "model_not_found")


def test_unknown_addresses_and_methods_are_errors_of_the_same_shape(server: Server):
    for path, method, want in [("/nothing", "GET", 404), ("/v1/embeddings", "GET", 405)]:
        status, reply, _ = request(server, path, method=method)
        assert (status, bool(message(reply))) == (want, True)


def test_an_error_inside_leaks_nothing(server: Server):
    status, reply, _ = request(server, "/v1/embeddings", {"input": "bug"})
    assert (status, message(reply)) == (500, "internal error")
    assert request(server, "/v1/embeddings", {"input": "broken"})[0] == 400


# ---------------------------------------------------------------------- queue and clients


def test_a_full_queue_answers_429_and_not_ready(server: Server, model: Fake):
    with waiting(server, model, *[{"input": f"text {i}"} for i in range(4)]) as statuses:
        status, reply, headers = request(server, "/v1/embeddings", {"input": "one more"})
        assert (status, message(reply)) == (429, "the queue is full; try again in a moment")
        assert int(headers["retry-after"]) >= 1
        assert request(server, "/ready")[1] == {"status": "full"}
        assert request(server, "/health")[0] == 200
    assert statuses() == [200] * 5
    assert request(server, "/ready")[0] == 200


def test_a_client_that_vanishes_frees_its_place(server: Server, model: Fake):
    body = json.dumps({"input": "vanishes"}).encode()
    with waiting(server, model):
        with closing(server) as sock:
            sock.sendall(head(len(body)) + body)
            wait_until(lambda: server.engine.waiting["embed"] == 1)
        wait_until(lambda: server.engine.waiting["embed"] == 0)
    assert [text for _, texts in model.log for text in texts] == ["first"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_for_a_client_that_vanished_is_not_written_on(
    server: Server, model: Fake, stream: bool
):
    words = " ".join(["w"] * 480)
    body = json.dumps(chat(words, stream=stream)).encode()
    model.dropped.clear()
    model.step_seconds = 0.005
    with closing(server) as sock:
        sock.sendall(head(len(body)).replace(b"embeddings", b"chat/completions") + body)
        wait_until(lambda: server.engine.generating == 1)
        if stream:
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
    wait_until(lambda: server.engine.generating == 0)
    model.step_seconds = 0.0
    assert len(model.dropped) == 1


@pytest.mark.slow
def test_an_answer_that_takes_too_long_is_given_up():
    model = Fake()
    model.step_seconds = 0.05
    with serving(model, limits=Limits(request_seconds=0.3)) as server:
        words = " ".join(["w"] * 100)
        status, reply, _ = request(server, "/v1/chat/completions", chat(words))
        assert (status, reply["error"]["code"]) == (504, "timeout")
        text = request(server, "/v1/chat/completions", chat(words, stream=True))[1]
        assert '"code": "timeout"' in text.strip().splitlines()[-1]
        assert "[DONE]" not in text
        wait_until(lambda: server.engine.generating == 0)


def test_a_draining_server_refuses_and_finishes(server: Server):
    model = Fake()
    with serving(model) as server, waiting(server, model, {"input": "waits"}) as statuses:
        assert not server.drain()
        status, reply, _ = request(server, "/v1/embeddings", {"input": "late"})
        assert (status, reply["error"]["code"]) == (503, "shutting_down")
        assert request(server, "/ready")[0] == 503
        assert request(server, "/health")[0] == 200
        model.open.set()
        wait_until(server.drain)
    assert statuses() == [200, 200]


def test_a_server_without_its_model_is_alive_and_not_ready(monkeypatch: pytest.MonkeyPatch):
    # A request must not import what the loading thread is importing: transformers then fails.
    monkeypatch.setitem(sys.modules, "cafe.model.captions", None)
    monkeypatch.setitem(sys.modules, "cafe.model.inference", None)
    loaded = threading.Event()
    model = Fake()

    def load() -> Fake:
        assert loaded.wait(20)
        return model

    search: Any = SimpleNamespace(think=0, by_tokens=False)
    server = Server(load, ServerSettings(name="fake", port=0), search)
    server.start()
    asked = [
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/models", None),
        ("/search", {"query": "a"}),
        ("/v1/rerank", {"query": "a", "documents": [{"image": image()}]}),
    ]
    try:
        wait_until(lambda: request(server, "/health")[0] == 200)
        assert request(server, "/ready")[:2] == (503, {"status": "loading"})
        for path, body in asked:
            status, reply, _ = request(server, path, body)
            assert (status, reply["error"]["code"]) == (503, "model_loading")
        loaded.set()
        wait_until(lambda: request(server, "/ready")[0] == 200)
    finally:
        loaded.set()
        server.stop()


# ---------------------------------------------------------------------- counters and search


def test_requests_batches_and_tokens_are_counted():
    with serving(Fake()) as server:
        request(server, "/v1/embeddings", {"input": ["abc", "de"]})
        request(server, "/v1/embeddings", {"input": 3})
        request(server, "/v1/chat/completions", chat("one two"))
        request(server, "/nothing/here")
        text = request(server, "/metrics")[1]
    for line in [
        'cafe_requests_total{route="/v1/embeddings",status="200"} 1.0',
        'cafe_requests_total{route="/v1/embeddings",status="400"} 1.0',
        'cafe_requests_total{route="other",status="404"} 1.0',
        'cafe_batch_size_sum{kind="embed"} 2.0',
        'cafe_batch_size_count{kind="generate"} 2.0',
        'cafe_tokens_total{kind="prompt"} 6.0',
        'cafe_tokens_total{kind="new"} 1.0',
        'cafe_queue_depth{kind="embed"} 0.0',
        "cafe_generating 0.0",
        "cafe_first_token_seconds_count 1.0",
    ]:
        assert line in text.splitlines(), text


def test_search_finds_in_an_index_and_does_not_say_where_it_lies(model: Fake, tmp_path: Path):
    pytest.importorskip("lancedb")
    from cafe.index import Index, IndexRow, ModelFacts

    index = Index.create(tmp_path / "secret.index", ModelFacts("fake", "w", "p", DIMENSION))
    texts = ["cat", "dog", "mug"]
    rows = [IndexRow(text, "text", text=text, width=10 * i) for i, text in enumerate(texts)]
    index.add(rows, np.stack([vector(text) for text in texts]))
    server = Server(lambda: model, ServerSettings(name="fake", port=0), IndexSearch(index))
    server.start()
    try:
        wait_until(lambda: server.engine.loaded)
        status, reply, _ = request(server, "/search", {"query": "dog", "top": 2})
        assert status == 200
        assert reply["hits"][0]["id"] == "dog"
        assert abs(reply["hits"][0]["score"] - 1) < 1e-5
        assert reply["hits"][0]["metadata"]["width"] == 10
        assert len(reply["hits"]) == 2
        some = request(server, "/search", {"query": "dog", "where": "width != 10"})[1]
        assert {hit["id"] for hit in some["hits"]} == {"cat", "mug"}
        both = {"query": "cat", "image": image()}
        assert request(server, "/search", both)[1]["hits"][0]["id"] == "cat"
        hybrid = {"query": "mug", "hybrid": True}
        status, reply, _ = request(server, "/search", hybrid)
        assert (status, message(reply)) == (
            400,
            "hybrid: this index has no texts to search by words",
        )
        index.optimize()
        assert request(server, "/search", hybrid)[1]["hits"][0]["id"] == "mug"
        # The fake embeds it as something else; the words decide.
        words = {"query": "a mug of dog", "hybrid": True, "top": 1}
        assert request(server, "/search", words)[1]["hits"][0]["id"] in {"mug", "dog"}
        (hit,) = asyncio.run(find_hits(server.service, "a mug of dog", None, 1, hybrid=True))
        assert hit.id in {"mug", "dog"}  # the page's search
        status, reply, _ = request(server, "/search", {"image": image(), "hybrid": True})
        assert (status, message(reply)) == (400, "hybrid needs words: give query")
        for body in ({}, {"query": "a", "top": 0}, *[{"query": "a", "where": w} for w in BAD_SQL]):
            status, reply, _ = request(server, "/search", body)
            assert (status, "secret" in message(reply)) == (400, False), message(reply)
        shutil.rmtree(tmp_path / "secret.index")
        status, reply, _ = request(server, "/search", {"query": "dog"})
        assert (status, message(reply)) == (500, "internal error")
        assert request(server, "/search", hybrid)[0] == 500
    finally:
        server.stop()


BAD_SQL = [
    "nonsense",
    "width >",
    "1; DROP TABLE items",
    "no_such_function(width)",
    "",
    "_rowaddr > 0",
    "width = 1 + 1",
    "array_length(array_repeat(id, 2)) > 1",
]


def test_without_an_index_there_is_no_search(server: Server):
    assert request(server, "/search", {"query": "a"})[0] == 404


@pytest.mark.slow
def test_a_slow_reader_is_given_up():
    model = Fake()
    model.step_seconds = 0.001
    limits = Limits(send_seconds=0.3, new_tokens=200_000, text_characters=10**7)
    limits = Limits(
        **{f: getattr(limits, f) for f in limits.__slots__} | {"request_characters": 10**7}
    )
    with serving(model, limits=limits) as server, closing(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        body = json.dumps(chat(" ".join(["w" * 200] * 20_000), stream=True)).encode()
        sock.sendall(head(len(body)).replace(b"embeddings", b"chat/completions") + body)
        wait_until(lambda: server.engine.generating == 1)
        wait_until(lambda: server.engine.generating == 0)
    assert model.dropped == [0], "the answer was written to its end"
