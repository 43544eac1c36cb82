"""Whatever a body says, the answer is a result or a refusal in OpenAI's shape, never a 500."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from typing import Any

import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cafe.serving.model_calls import CafeCalls
from cafe.serving.run import Server
from helpers.fakes import data_uri, request, started

IMAGE = data_uri(PIL.Image.new("RGB", (8, 8), "red"))
BROKEN = [
    IMAGE[:60],
    "data:image/png;base64,!",
    "file:///etc/passwd",
    "http://10.0.0.1/a",
    "",
    "a",
]

texts = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(categories=("Cs", "L", "Cc", "So")), max_size=6),
    st.sampled_from(["<image>", "<|im_end|>", "<|im_start|>", "{{ 1/0 }}", "\x00", "\ud83d"]),
)
numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, 1, 2, -1, 2**31, 2**63, 1e308, 1e-320])
)
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
urls = st.sampled_from([IMAGE, *BROKEN])
parts = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": texts}),
    st.fixed_dictionaries(
        {"type": st.just("image_url"), "image_url": urls | st.fixed_dictionaries({"url": urls})}
    ),
    anything,
)
roles = st.sampled_from(["system", "developer", "user", "assistant", "tool"])
messages = st.lists(
    st.fixed_dictionaries({"role": roles, "content": texts | st.lists(parts, max_size=3)})
    | anything,
    max_size=3,
)
sides = texts | st.fixed_dictionaries(
    {}, optional={"text": texts, "image": urls, "content": st.lists(parts, max_size=2)}
)
BODIES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "/v1/embeddings": {
        "input": texts
        | st.lists(texts, max_size=3)
        | st.lists(st.integers() | st.integers(0, 99), max_size=3)
        | st.lists(sides, max_size=2),
        "modality": st.sampled_from(["text", "image", "audio"]),
        "output_dtype": st.sampled_from(["float", "int8", "ubinary", "x"]),
        "instruction": texts,
        "messages": messages | st.lists(messages, max_size=2),
        "dimensions": st.integers(-1, 80),
        "encoding_format": st.sampled_from(["float", "base64", "bytes"]),
    },
    "/v1/chat/completions": {
        "messages": messages,
        "max_tokens": st.integers(-1, 4),
        "max_completion_tokens": st.integers(1, 3),
        "temperature": numbers | st.floats(0, 2),
        "top_p": numbers | st.floats(0, 1),
        "seed": st.integers(-(2**70), 2**70),
        "stop": texts | st.lists(texts, max_size=5),
        "stream": st.booleans(),
        "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
        "n": st.integers(0, 2),
        "logit_bias": st.dictionaries(
            st.sampled_from(["1", "9999", "-1", "x"]), numbers, max_size=2
        ),
        "frequency_penalty": numbers | st.floats(-2, 2),
        "presence_penalty": numbers | st.floats(-2, 2),
        "top_k": st.integers(-2, 3),
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(-1, 21),
        "response_format": st.sampled_from(
            [{"type": "json_object"}, {"type": "x"}, {"type": "json_schema", "json_schema": {}}]
        )
        | st.fixed_dictionaries(
            {
                "type": st.just("json_schema"),
                "json_schema": st.fixed_dictionaries({"schema": anything}),
            }
        ),
        "tools": st.sampled_from([[], [{}], None]),
    },
    "/v2/embed": {
        "texts": st.lists(texts, max_size=3),
        "images": st.lists(urls, max_size=2),
        "inputs": st.lists(
            st.fixed_dictionaries({"content": st.lists(parts, max_size=2)}), max_size=2
        ),
        "embedding_types": st.lists(
            st.sampled_from(["float", "int8", "uint8", "binary", "ubinary", "base64", "x"]),
            max_size=3,
        ),
        "output_dimension": st.integers(-1, 80),
        "truncate": st.sampled_from(["NONE", "START", "END"]),
    },
    "/embed": {
        "inputs": texts | st.lists(texts, max_size=3) | st.lists(st.integers(-1, 99), max_size=3),
        "normalize": st.booleans(),
        "truncate": st.booleans(),
    },
    "/pooling": {"input": texts | st.lists(sides, max_size=2), "task": texts},
    "/rerank": {
        "query": texts,
        "texts": st.lists(texts, max_size=3),
        "documents": st.lists(sides, max_size=2),
        "top_n": st.integers(-1, 4),
        "instruction": texts,
    },
    "/score": {
        "text_1": sides | st.lists(sides, max_size=2),
        "text_2": sides | st.lists(sides, max_size=2),
        "instruction": texts,
    },
    "/v1/rerank": {
        "query": texts | sides,
        "documents": st.lists(st.just({"image": IMAGE}), min_size=1, max_size=2)
        | st.lists(sides, max_size=3),
        "top_n": st.integers(-1, 4),
        "return_documents": st.booleans(),
    },
}
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "a red cube"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/rerank": {"query": "a red cube", "documents": [{"image": IMAGE}]},
    "/v2/embed": {"texts": ["a red cube"]},
    "/embed": {"inputs": "a red cube"},
    "/pooling": {"input": "a red cube"},
    "/rerank": {"query": "a red cube", "texts": ["a cube"]},
    "/score": {"text_1": "a red cube", "text_2": "a cube"},
}


@st.composite
def likely(draw: st.DrawFn, path: str) -> Any:
    """A right body of which some fields are drawn anew, now and then one of another kind."""
    fields = BODIES[path]
    names = draw(st.sets(st.sampled_from(sorted(fields)), max_size=4))
    body = RIGHT[path] | {name: draw(fields[name]) for name in sorted(names)}
    if draw(st.integers(0, 5)) == 0:
        body[draw(st.sampled_from(sorted(fields)) | texts)] = draw(anything)
    return body


@pytest.fixture(scope="module")
def server(small_model: Any) -> Iterator[Server]:
    server = started(CafeCalls(small_model), max_wait_seconds=0.0)
    yield server
    server.stop()


def check(server: Server, path: str, body: bytes) -> int:
    status, reply, _ = request(server, path, body)
    assert status in {200, 400, 413, 429}, reply
    if status != 200:
        assert set(reply["error"]) == {"message", "type", "param", "code"}
        assert not any(
            word in reply["error"]["message"] for word in ("Traceback", "/work", "/root")
        )
    elif isinstance(reply, str):
        assert reply.endswith("data: [DONE]\n\n")
    return status


SLOW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.slow
@pytest.mark.parametrize("path", BODIES)
def test_bodies_that_are_nearly_right_never_break_the_server(server: Server, path: str):
    statuses: list[int] = []

    @SLOW
    @given(likely(path))
    def run(body: Any) -> None:
        statuses.append(check(server, path, json.dumps(body).encode()))

    run()
    assert 200 in statuses, "nothing was ever right, so little was tried"
    assert 400 in statuses


@pytest.mark.parametrize("path", BODIES)
def test_bodies_of_any_json_or_none_never_break_the_server(server: Server, path: str):
    junk = st.text(string.printable, max_size=40).map(str.encode) | st.binary(max_size=40)

    @settings(SLOW, max_examples=25)
    @given(anything.map(lambda value: json.dumps(value).encode()) | junk)
    def run(body: bytes) -> None:
        assert check(server, path, body) == 400

    run()
