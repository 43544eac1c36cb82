"""What every route must hold to, whoever's shape it has: limits, images, keys, ignored fields."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import PIL.Image
import pytest

from cafe.serving.ignored import MAX_NAMES
from cafe.serving.limits import Limits
from cafe.serving.run import Server
from helpers.fakes import Fake, data_uri, request, started
from helpers.serving import LIMITS, bomb, message, serving, waiting

Body = dict[str, Any]


def parts(*urls: str) -> list[Any]:
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def chats(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


def told(urls: list[str]) -> list[Any]:
    parts = [{"type": "input_image", "image_url": url} for url in urls]
    return [{"role": "user", "content": parts}]


def systemone(texts: list[str]) -> Body:
    questions = {f"q{i}": {"type": "noul", "instructions": t} for i, t in enumerate(texts)}
    return {"state": "a", "questions": questions}


def predicate(instructions: Any) -> dict[str, Any]:
    content = instructions[0]["content"] if isinstance(instructions, list) else instructions
    return {"type": "predicate", "instructions": content}


OF_TEXTS: dict[str, Callable[[list[str]], Body]] = {
    "/v1/embeddings": lambda t: {"input": t},
    "/embeddings": lambda t: {"input": t, "modality": "text"},
    "/pooling": lambda t: {"input": t},
    "/v2/embed": lambda t: {"texts": t, "truncate": "NONE"},
    "/embed": lambda t: {"inputs": t},
    "/embed_all": lambda t: {"inputs": t},
    "/v1/rerank": lambda t: {"query": "a", "documents": t},
    "/v2/rerank": lambda t: {"query": "a", "documents": t},
    "/rerank": lambda t: {"query": "a", "texts": t},
    "/v1/score": lambda t: {"queries": "a", "documents": t},
    "/score": lambda t: {"text_1": "a", "text_2": t},
    "/v1/decisions": lambda t: {"input": "a", "questions": [predicate(one) for one in t]},
    "/v1/systemone": systemone,
}
"""A body with several texts, for every route that takes them."""

OF_ONE: dict[str, Body] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/responses": {"input": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [97]},
}
"""A body for every other route."""

BODIES = {path: body(["a"]) for path, body in OF_TEXTS.items()} | OF_ONE
WITHOUT_IMAGES = {"/embed", "/embed_all", "/v1/systemone", "/tokenize", "/detokenize"}

OF_IMAGES: dict[str, tuple[str, Callable[[list[str]], Body]]] = {
    "parts": ("/v1/embeddings", lambda u: {"messages": chats(parts(*u))}),
    "OpenAI": ("/v1/embeddings", lambda u: {"input": parts(*u)}),
    "Jina": ("/v1/embeddings", lambda u: {"input": [{"image": url} for url in u]}),
    "infinity": ("/embeddings", lambda u: {"input": u, "modality": "image"}),
    "vLLM": ("/pooling", lambda u: {"input": [{"image": url} for url in u]}),
    "Cohere": ("/v2/embed", lambda u: {"images": u}),
    "Cohere's inputs": ("/v2/embed", lambda u: {"inputs": [{"content": parts(*u)}]}),
    "documents": ("/v1/rerank", lambda u: {"query": "a", "documents": [{"image": x} for x in u]}),
    "contents": ("/v2/rerank", lambda u: {"query": {"content": parts(*u)}, "documents": ["a"]}),
    "rerank": ("/rerank", lambda u: {"query": "a", "documents": [{"content": parts(*u)}]}),
    "score": ("/score", lambda u: {"queries": [{"image": x} for x in u], "documents": "a"}),
    "items": ("/v1/score", lambda u: {"queries": "a", "items": [{"content": parts(*u)}]}),
    "decisions": ("/v1/decisions", lambda u: {"input": told(u), "questions": [predicate("a")]}),
    "questions": ("/v1/decisions", lambda u: {"input": "a", "questions": [predicate(told(u))]}),
    "chat": ("/v1/chat/completions", lambda u: {"messages": [*chats(parts(*u)), *chats("hi")]}),
    "responses": ("/v1/responses", lambda u: {"input": [*told(u), *chats("hi")]}),
}
"""A body with several images, for every place where they may stand."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = started(Fake(), limits=LIMITS, max_queue=4)
    yield server
    server.stop()


def image(width: int = 20, height: int = 10) -> str:
    return data_uri(PIL.Image.new("RGB", (width, height), "red"))


def test_every_route_is_tried(server: Server):
    paths = request(server, "/openapi.json")[1]["paths"]
    posts = {path for path, methods in paths.items() if "post" in methods}
    assert posts == {*OF_TEXTS, *OF_ONE}
    assert posts - WITHOUT_IMAGES == {path for path, _ in OF_IMAGES.values()}


@pytest.mark.parametrize("path", OF_TEXTS)
def test_texts_are_counted_and_bounded(server: Server, path: str):
    body = OF_TEXTS[path]
    assert request(server, path, body(["cat", "dog"]))[0] == 200
    for texts, reason in [
        (["a"] * 6, "exceed the limit of 5"),
        (["a" * 1001], "1,001 characters"),
        (["a" * 900] * 2, "exceed 1,500 characters"),
        (["\ud800"], "unpaired surrogate"),
        ([], "needs at least one item"),
    ]:
        status, reply, _ = request(server, path, body(texts))
        assert (status, reason in message(reply)) == (400, True), message(reply)
    assert request(server, path, b"a" * 2_000_001)[0] == 413
    assert request(server, path, b"{")[0] == 400
    assert request(server, path, body(["bug"]))[:2][0] in {200, 500}  # a question is about it


@pytest.mark.parametrize("name", OF_IMAGES)
def test_images_are_read_from_the_request_only_and_bounded(server: Server, name: str):
    path, body = OF_IMAGES[name]
    status, reply, _ = request(server, path, body([image()]))
    assert status == 200, reply
    for urls, reason in [
        (["file:///etc/passwd"], "local files are never read"),
        (["/etc/passwd"], "local files are never read"),
        (["http://8.8.8.8/a.png"], "not allowed"),
        (["data:image/png;base64,aGVsbG8="], "not a readable image"),
        ([image(101, 100)], "101x100"),
        ([image()] * 3, "more than 2 images"),
        ([image(100, 100)] * 2, "15,000 pixels"),
        ([bomb(60_000, 60_000)], "decompression bomb"),
    ]:
        status, reply, _ = request(server, path, body(urls))
        assert (status, reason in message(reply)) == (400, True), message(reply)
        assert "root:" not in message(reply)


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/score"])
def test_a_query_is_not_multiplied_beyond_the_limits(server: Server, path: str):
    name = "queries" if path == "/score" else "query"
    documents = {"documents": ["a"] * 5}
    shown = [{"content": parts(image(), image())}, {"content": parts(image())}, "a" * 300]
    for query, want in [(shown[0], 400), (shown[1], 200), (shown[2], 200), ("a" * 500, 400)]:
        status, reply, _ = request(server, path, documents | {name: query})
        assert status == want, reply
        assert want == 200 or "send fewer documents" in message(reply)


def test_an_input_is_not_multiplied_by_its_questions_beyond_the_limits(server: Server):
    def asked(**fields: Any) -> tuple[int, Any]:
        body = {"input": "a", "questions": [predicate("b")]} | fields
        return request(server, "/v1/decisions", body)[:2]

    def choice(count: int, **more: Any) -> list[Any]:
        options = [{"value": f"v{i}"} | more for i in range(count)]
        return [{"type": "choice", "instructions": "c", "choices": options}]

    assert asked(questions=choice(5))[0] == 200
    for fields, reason in [
        ({"questions": choice(6)}, "exceed the limit of 5"),
        ({"questions": [*choice(3), *choice(3)]}, "exceed the limit of 5"),
        ({"input": "a" * 400, "questions": choice(5)}, "ask fewer questions"),
        ({"questions": choice(5, description="d" * 90)}, "ask fewer questions"),
        ({"input": told([image(), image()]), "questions": choice(5)}, "ask fewer questions"),
        ({"questions": choice(1)}, "at least 2 items"),
        ({"questions": [choice(2)[0] | {"choices": [{"value": "true"}, {"value": True}]}]}, "same"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input"),
    ]:
        status, reply = asked(**fields)
        assert (status, reason in message(reply)) == (400, True), message(reply)


def test_vectors_of_tokens_are_bounded():
    limits = Limits(token_vector_characters=10)
    with serving(Fake(), limits=limits) as server:
        for path, name in (("/pooling", "input"), ("/embed_all", "inputs")):
            assert request(server, path, {name: ["cats", "dogs"]})[0] == 200
            assert request(server, path, {name: ["cats", "dogs", "mug"]})[0] == 400


def test_every_route_needs_the_key_and_one_of_the_servers_names(server: Server):
    with serving(Fake(), api_key="a-secret") as locked:
        for path in [*BODIES, "/v1/models/fake"]:
            assert request(locked, path, {} if path in BODIES else None)[0] == 401, path
    for path, body in BODIES.items():
        found = request(server, path, body, headers={"Host": "evil.example.com"})
        assert found[0] == 403, path


@pytest.mark.parametrize("path", [path for path in BODIES if not path.startswith("/embed")])
def test_every_route_refuses_another_models_name(server: Server, path: str):
    status, reply, _ = request(server, path, BODIES[path] | {"model": "gpt"})
    assert (status, reply["error"]["code"]) == (404, "model_not_found")


def test_a_full_queue_refuses_all(server: Server):
    """Whatever route a request came by, its items wait in the same queue."""
    model = Fake()
    with (
        serving(model, limits=LIMITS, max_queue=4) as busy,
        waiting(busy, model, *[{"input": f"text {i}"} for i in range(4)]),
    ):
        for path, body in OF_TEXTS.items():
            assert request(busy, path, body(["a"]))[0] == 429, path


# ---------------------------------------------------------------------- fields that change nothing


@pytest.mark.parametrize("path", BODIES)
def test_fields_that_change_nothing_are_named(server: Server, path: str):
    plain = request(server, path, BODIES[path])
    assert "x-cafe-ignored-fields" not in plain[2]
    fields = {"user": "me", "store": None, "a_vendors": {"own": 1}}
    status, _, headers = request(server, path, BODIES[path] | fields)
    assert (status, headers["x-cafe-ignored-fields"]) == (200, "user, a_vendors")


def test_they_are_named_where_they_stand_once_in_the_log(
    server: Server, caplog: pytest.LogCaptureFixture
):
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    body = {"messages": [*chats([part, part]), *chats("b")], "service_tier": "auto"}
    body["messages"][2 - 1]["name"] = "ann"
    with caplog.at_level(logging.INFO, "cafe.serving"):
        for stream in (False, True):
            answer = request(server, "/v1/chat/completions", body | {"stream": stream})
            names = answer[2]["x-cafe-ignored-fields"].split(", ")
            assert sorted(names) == [
                "messages.content.cache_control",
                "messages.name",
                "service_tier",
            ]
    said = [one for one in caplog.messages if "cache_control" in one]
    assert len(said) == 1


def test_names_are_few_short_and_plain(server: Server):
    many = {f"k{i}": 1 for i in range(90)}
    names = request(server, "/v1/embeddings", {"input": "a"} | many)[2]["x-cafe-ignored-fields"]
    assert len(names.split(", ")) == MAX_NAMES
    evil = {"a\r\nSet-Cookie: x=1": 1, "ü" * 500: 1, "": 1}
    status, _, headers = request(server, "/v1/embeddings", {"input": "a"} | evil)
    assert (status, "set-cookie" in headers) == (200, False)
    assert headers["x-cafe-ignored-fields"] == f"a??Set-Cookie??x?1, {'?' * 80}, ?"
    assert (
        request(server, "/v1/embeddings", {"input": "a"} | {f"k{i}": 1 for i in range(101)})[0]
        == 400
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "logit_bias": {}, "logprobs": False},
        {"repetition_penalty": 1.0, "min_p": 0.0, "ignore_eos": False, "top_k": -1},
        {"chat_template_kwargs": {}, "frequency_penalty": 0, "presence_penalty": 0.0, "n": 1},
    ],
)
def test_neutral_values_are_taken(server: Server, fields: Body):
    status, reply, headers = request(
        server, "/v1/chat/completions", {"messages": chats("hi there")} | fields
    )
    assert (status, reply["choices"][0]["message"]["content"]) == (200, "hi there")
    assert "x-cafe-ignored-fields" not in headers


def test_one_model_is_found_by_its_name(server: Server):
    assert request(server, "/v1/models/fake")[1]["id"] == "fake"
    assert request(server, "/v1/models/org/other")[0] == 404
