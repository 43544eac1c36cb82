"""Questions about one image over HTTP: read once for one key, never shared between two."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.fakes import data_uri, request, started
from helpers.images import sample_image


@pytest.fixture
def server(tiny: Any) -> Iterator[Any]:
    """With an empty prefix cache."""
    from cafe.serving.model_calls import CafeCalls

    server = started(CafeCalls(tiny), name="tiny")
    yield server
    server.stop()


def ask(server: Any, text: str, image: str, key: str = "one", **fields: Any) -> str:
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 16} | fields
    headers = {"Authorization": f"Bearer {key}"}
    status, reply, _ = request(server, "/v1/chat/completions", body, headers=headers)
    assert status == 200, reply
    return reply["choices"][0]["message"]["content"]


def use(server: Any) -> tuple[int, int]:
    """Misses and hits."""
    prefixes = server.engine.prefixes
    return prefixes.misses, prefixes.hits


def test_one_image_is_read_once_for_one_key_and_again_for_another(server: Any, tiny: Any):
    image = sample_image(1)
    uri = data_uri(image)
    texts = ["Describe this image.", "How many objects are there?"]
    want = [tiny.generate({"image": image, "text": t}, max_new_tokens=16) for t in texts]
    assert [ask(server, text, uri) for text in texts] == want
    assert use(server) == (1, 1)
    assert [ask(server, text, uri, "another") for text in texts] == want
    assert use(server) == (2, 2), "the image of one key was found by another"
    assert ask(server, texts[0], data_uri(sample_image(2))) != ""
    assert use(server) == (3, 2)
    text = request(server, "/metrics")[1]
    assert "cafe_prefix_cache_hits 2.0" in text
    assert "cafe_prefix_cache_misses 3.0" in text


def test_keys_that_ask_at_the_same_moment_share_nothing(server: Any):
    """Also not the reading of an image within one batch."""
    uri = data_uri(sample_image(1))
    threads = [
        threading.Thread(target=ask, args=(server, f"Is there a {n}?", uri, key))
        for n in range(4)
        for key in ("one", "another")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert use(server) == (2, 6)


def test_detail_is_part_of_what_is_seen(server: Any):
    large = sample_image(1).resize((1200, 900))
    uri = data_uri(large)
    ask(server, "What is it?", uri)
    part = {"type": "image_url", "image_url": {"url": uri, "detail": "low"}}
    body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 2}
    headers = {"Authorization": "Bearer one"}
    assert request(server, "/v1/chat/completions", body, headers=headers)[0] == 200
    assert use(server) == (2, 0)


def test_several_answers_to_one_prompt_read_its_image_once(server: Any):
    ask(server, "What is it?", data_uri(sample_image(1)), n=4, temperature=1.0)
    assert use(server) == (1, 3)
