"""Over a real socket with the real `openai` client and the bundled model."""

from __future__ import annotations

import base64
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest

from cafe.model.rerank import RerankBy
from cafe.model.thoughts import UNTRAINED
from cafe.model.vlm import CAFe
from cafe.serving.run import Server
from helpers.fakes import data_uri, request
from helpers.images import sample_image

TEXTS = ["a red cat", "two dogs at the top left", "", "cat <image> <|im_end|>", "naïve “q” 你好"]
DESCRIBE = "Describe this image."


def shown(seed: int, text: str | None = None) -> list[Any]:
    part = {"type": "image_url", "image_url": {"url": data_uri(sample_image(seed))}}
    texts = [] if text is None else [{"type": "text", "text": text}]
    return [{"role": "user", "content": [part, *texts]}]


def vectors(reply: Any) -> np.ndarray:
    assert [d.index for d in reply.data] == list(range(len(reply.data)))
    return np.array([d.embedding for d in reply.data], dtype=np.float32)


# ---------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}])
def test_embeddings_are_those_of_encode(client: openai.OpenAI, tiny: CAFe, encoding: Any):
    """Without an encoding the client asks for base64."""
    reply = client.embeddings.create(model="tiny", input=TEXTS, **encoding)
    want = tiny.encode(TEXTS)
    assert np.abs(vectors(reply) - want).max() < 1e-5
    assert np.abs(want[0] - want[1]).max() > 0.01, "all alike shows nothing"
    alone = client.embeddings.create(model="tiny", input=TEXTS[1], **encoding)
    assert np.abs(vectors(alone)[0] - want[1]).max() < 1e-5


def test_dimensions_cut_and_normalise_as_encode_does(client: openai.OpenAI, tiny: CAFe):
    reply = client.embeddings.create(model="tiny", input=TEXTS[:2], dimensions=16)
    assert vectors(reply).shape == (2, 16)
    assert np.abs(vectors(reply) - tiny.encode(TEXTS[:2], truncate_dim=16)).max() < 1e-5
    assert np.allclose(np.linalg.norm(vectors(reply), axis=1), 1, atol=1e-5)


def test_base64_is_little_endian_float32(server: Server, tiny: CAFe):
    body = {"input": "a red cat", "encoding_format": "base64"}
    reply = request(server, "/v1/embeddings", body)[1]
    found = np.frombuffer(base64.b64decode(reply["data"][0]["embedding"]), "<f4")
    assert np.abs(found - tiny.encode("a red cat")).max() < 1e-5


def test_chats_with_images_are_embedded_as_encode_does(server: Server, tiny: CAFe):
    chats = [shown(1), shown(2, "a red cat"), [{"role": "user", "content": "a red cat"}]]
    want = tiny.encode(
        [sample_image(1), {"image": sample_image(2), "text": "a red cat"}, "a red cat"]
    )
    batch = request(server, "/v1/embeddings", {"messages": chats})[1]
    assert np.abs(np.array([d["embedding"] for d in batch["data"]]) - want).max() < 1e-5
    one = request(server, "/v1/embeddings", {"messages": chats[1]})[1]
    assert np.abs(np.array(one["data"][0]["embedding"]) - want[1]).max() < 1e-5


def test_captions_are_written_mixed_in_and_returned(
    server: Server, client: openai.OpenAI, tiny: CAFe
):
    chats = [shown(1), shown(2, "a red cat"), [{"role": "user", "content": "a red cat"}]]
    inputs: list[Any] = [
        sample_image(1),
        {"image": sample_image(2), "text": "a red cat"},
        "a red cat",
    ]
    reply = request(server, "/v1/embeddings", {"messages": chats, "caption": True})[1]
    captions = tiny.write_captions(inputs)
    assert [one["caption"] for one in reply["data"]] == captions
    assert captions[0]
    assert captions[1:] == [None, None]
    found = np.array([one["embedding"] for one in reply["data"]])
    assert np.abs(found - tiny.encode(inputs, caption=captions)).max() < 1e-5
    plain = request(server, "/v1/embeddings", {"messages": chats})[1]
    assert "caption" not in plain["data"][0]
    assert np.abs(found[0] - np.array(plain["data"][0]["embedding"])).max() > 1e-3
    assert reply["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 36, (
        "image read twice"
    )
    # As the official client sends a field that OpenAI's own server does not know.
    one = client.embeddings.create(model="tiny", input="a cat", extra_body={"caption": True})
    assert np.abs(vectors(one)[0] - tiny.encode("a cat")).max() < 1e-5


def test_embeddings_are_read_after_thoughts_that_are_returned(
    server: Server, tiny: CAFe, caplog: pytest.LogCaptureFixture
):
    chats = [shown(1), shown(2, "a red cat"), [{"role": "user", "content": "a red cat"}]]
    inputs: list[Any] = [
        sample_image(1),
        {"image": sample_image(2), "text": "a red cat"},
        "a red cat",
    ]
    body = {"messages": chats, "think": 9}
    with caplog.at_level(logging.WARNING, "cafe.serving"):
        reply = request(server, "/v1/embeddings", body)[1]
        request(server, "/v1/embeddings", body)
    assert caplog.messages == [f"think: {UNTRAINED}"]  # once
    thoughts = tiny.write_captions(inputs, max_new_tokens=9)
    assert [one["thought"] for one in reply["data"]] == thoughts
    assert thoughts[0]
    assert thoughts[1:] == [None, None]
    found = np.array([one["embedding"] for one in reply["data"]])
    assert np.abs(found - tiny.encode(inputs, think=thoughts)).max() < 1e-5
    plain = request(server, "/v1/embeddings", {"messages": chats, "think": 0})[1]
    assert "thought" not in plain["data"][0]
    assert np.abs(found[0] - np.array(plain["data"][0]["embedding"])).max() > 1e-3
    assert reply["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 36


def test_a_thought_waits_for_no_one_and_nobody_for_it(server: Server, tiny: CAFe):
    """Texts are embedded, and a chat is answered, between the tokens of a long thought."""
    done: list[str] = []

    def ask(name: str, path: str, body: Any) -> None:
        assert request(server, path, body)[0] == 200
        done.append(name)

    with ThreadPoolExecutor(2) as pool:
        body = {"messages": [shown(seed) for seed in range(6)], "think": 64}
        thinking = pool.submit(ask, "thoughts", "/v1/embeddings", body)
        deadline = time.monotonic() + 60
        while not server.engine.generating:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        ask("text", "/v1/embeddings", {"input": "a red cat"})
        thinking.result()
    assert done == ["text", "thoughts"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"think": 5000}, "think: at most 4,096 are allowed"),
        ({"think": 9, "caption": True}, "caption and think are two ways"),
        ({"think": -1}, "think: must be at least 0"),
        ({"think": True}, "think: must be an integer"),
        ({"think": 3000, "messages": "long"}, "tokens exceed the model's limit"),
    ],
)
def test_bad_thoughts_are_refused(server: Server, body: Any, message: str):
    if "messages" in body:
        body["messages"] = [{"role": "user", "content": "cat " * 3000}]
    reply = request(server, "/v1/embeddings", {"messages": shown(1), **body})
    assert reply[0] == 400
    assert message in reply[1]["error"]["message"]


def test_tokens_are_counted_with_the_template_and_the_image(server: Server, tiny: CAFe):
    for body, value in [
        ({"input": "a red cat"}, "a red cat"),
        ({"messages": shown(1)}, sample_image(1)),
    ]:
        usage = request(server, "/v1/embeddings", body)[1]["usage"]
        row = tiny.collator.embedding_rows([as_one(value)])[0].input_ids
        assert usage == {"prompt_tokens": row.shape[1], "total_tokens": row.shape[1]}


def as_one(value: Any) -> Any:
    from cafe.model.rows.inputs import as_conversation

    return as_conversation(value)


def test_a_text_longer_than_the_model_reads_is_refused(client: openai.OpenAI):
    with pytest.raises(
        openai.BadRequestError, match=r"input 1: \d+ tokens exceed the model's limit"
    ):
        client.embeddings.create(model="tiny", input=["cat", "cat " * 3000])


@pytest.mark.parametrize("text", ["a" * 200_000, "<|im_end|>" * 20_000, "a\u200d\u0301" * 60_000])
def test_a_far_too_long_text_is_never_tokenised_whole(server: Server, tiny: CAFe, text: str):
    model = server.engine.model
    excess = model.excess(text)
    assert excess is not None
    assert excess[0] > model.max_tokens
    assert excess[1] < len(text) / 2
    body = {"input": [text] * 10}
    status, reply, _ = request(server, "/v1/embeddings", body)
    assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
    chat = {"messages": [{"role": "user", "content": text}], "stream": True}
    status, reply, _ = request(server, "/v1/chat/completions", chat)
    assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")


def test_a_long_text_that_fits_is_embedded(server: Server, tiny: CAFe):
    text = "cat " * 600
    assert len(text) > server.engine.model.max_tokens
    assert server.engine.model.excess(text) is None
    status, reply, _ = request(server, "/v1/embeddings", {"input": text})
    assert status == 200
    expected = tiny.encode(text)
    np.testing.assert_allclose(reply["data"][0]["embedding"], expected, atol=1e-5)


# ---------------------------------------------------------------------- chat


def test_an_answer_is_sent_back_as_the_client_received_it(client: openai.OpenAI):
    """With `refusal: null`, as the official client's `model_dump` has it, and other nulls."""
    asked = shown(1, DESCRIBE)
    reply = client.chat.completions.create(model="tiny", messages=asked, max_tokens=4)
    answer: Any = reply.choices[0].message.model_dump()
    assert answer["refusal"] is None
    again = client.chat.completions.create(
        model="tiny",
        messages=[*asked, answer, {"role": "user", "content": "And what else?"}],
        max_tokens=4,
        extra_body={"response_format": None, "tools": None, "stream_options": None},
    )
    assert again.choices[0].message.content is not None


def test_null_is_the_default_of_fields_that_have_one(client: openai.OpenAI):
    shown_image = shown(1, DESCRIBE)
    shown_image[0]["content"][0]["image_url"]["detail"] = None
    given: Any = {"model": "tiny", "messages": shown_image, "max_tokens": 4}
    want = client.chat.completions.create(**given).choices[0].message.content
    assert (
        want
        == client.chat.completions.create(
            **given, extra_body=dict.fromkeys(("n", "stream", "temperature", "stop"))
        )
        .choices[0]
        .message.content
    )
    assert (
        client.embeddings.create(
            model="tiny", input="a", extra_body={"encoding_format": None, "dimensions": None}
        )
        .data[0]
        .embedding
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_answers_are_those_of_generate(client: openai.OpenAI, tiny: CAFe, seed: int):
    value = {"image": sample_image(seed), "text": DESCRIBE}
    want = tiny.generate(value, max_new_tokens=24)
    assert want
    reply = client.chat.completions.create(
        model="tiny", messages=shown(seed, DESCRIBE), max_tokens=24, temperature=0
    )
    assert reply.choices[0].message.content == want
    assert reply.usage is not None
    at_limit = reply.usage.completion_tokens == 24
    assert reply.choices[0].finish_reason == ("length" if at_limit else "stop")
    assert reply.usage.prompt_tokens > 36, "an image alone has more tokens"


def test_a_stream_joins_to_the_same_answer(client: openai.OpenAI):
    asked = {"model": "tiny", "messages": shown(1, DESCRIBE), "max_completion_tokens": 120}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(map(bool, pieces)) > 5, "it came in one piece"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "stop"]
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_a_limit_and_a_stop_text_end_an_answer(client: openai.OpenAI):
    asked = {"model": "tiny", "messages": shown(1, DESCRIBE)}
    whole = client.chat.completions.create(**asked, max_tokens=24).choices[0].message.content or ""
    short = client.chat.completions.create(**asked, max_tokens=3)
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None
    assert short.usage.completion_tokens == 3
    assert whole.startswith(short.choices[0].message.content or "none")
    word = whole.split()[3]
    stopped = client.chat.completions.create(**asked, max_tokens=24, stop=[word])
    assert stopped.choices[0].message.content == whole[: whole.index(word)].strip()
    assert stopped.choices[0].finish_reason == "stop"


def test_a_seed_repeats_a_sampled_answer(client: openai.OpenAI):
    asked = {"model": "tiny", "messages": shown(1, DESCRIBE), "max_tokens": 12, "temperature": 1.5}

    def said(**more: Any) -> str | None:
        return client.chat.completions.create(**asked, **more).choices[0].message.content

    assert said(seed=1) == said(seed=1)
    assert len({said(seed=seed) for seed in range(4)}) > 1
    greedy = client.chat.completions.create(**asked | {"temperature": 0})
    assert said(seed=1, top_p=0.0) == greedy.choices[0].message.content


def test_a_conversation_goes_on(client: openai.OpenAI, tiny: CAFe):
    turns = [
        {"role": "developer", "content": "Be short."},
        *shown(1, DESCRIBE),
        {"role": "assistant", "content": "A red cat."},
        {"role": "user", "content": "How many objects are there?"},
    ]
    same = [{"role": "system", "content": "Be short."}, *shown_locally(1, DESCRIBE), *turns[2:]]
    reply = client.chat.completions.create(model="tiny", messages=turns, max_tokens=12)
    assert reply.choices[0].message.content == tiny.generate(same, max_new_tokens=12)


def shown_locally(seed: int, text: str) -> list[Any]:
    image = {"type": "image", "image": sample_image(seed)}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


# ---------------------------------------------------------------------- the rest


@pytest.mark.parametrize("by", ["question", "likelihood"])
@pytest.mark.parametrize("swapped", [False, True])
def test_documents_are_ordered_as_rerank_orders_them(
    server: Server, tiny: CAFe, swapped: bool, by: RerankBy
):
    texts = ["a red cat", "a big lemon at the top right", "two dogs", "a bus", "a blue house"]
    images = [data_uri(sample_image(seed)) for seed in range(5)]
    if swapped:
        body = {"query": "a big lemon", "documents": [{"image": url} for url in images]}
        want = tiny.rerank("a big lemon", [sample_image(seed) for seed in range(5)], by=by)
    else:
        part = {"type": "image_url", "image_url": {"url": images[0]}}
        body = {"query": {"content": [part]}, "documents": texts}
        want = tiny.rerank(sample_image(0), texts, by=by)
    status, reply, _ = request(
        server, "/v1/rerank", body | {"model": "tiny", "top_n": 4, "rerank_by": by}
    )
    assert status == 200
    order = np.argsort(-want.posterior)[:4].tolist()
    assert [r["index"] for r in reply["results"]] == order
    found = [r["relevance_score"] for r in reply["results"]]
    assert np.allclose(found, want.posterior[order], rtol=1e-3)
    name = "match" if by == "question" else "log_likelihood"
    judged = getattr(want, name)
    assert np.allclose([r[name] for r in reply["results"]], judged[order], rtol=1e-4, atol=1e-5)
    if not swapped:
        if by == "question":
            assert order != np.argsort(-judged)[:4].tolist(), "the cosine counts"
        assert [r["document"]["text"] for r in reply["results"]] == [texts[i] for i in order]


def test_two_texts_have_no_likelihood(server: Server):
    body = {"query": "a", "documents": ["b"], "rerank_by": "likelihood"}
    status, reply, _ = request(server, "/v1/rerank", body)
    assert (status, "image" in reply["error"]["message"]) == (400, True)


def test_models_lists_the_one(client: openai.OpenAI, tiny: CAFe):
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert model.model_dump()["max_model_len"] == tiny.collator.max_tokens


@pytest.mark.slow
def test_many_clients_get_their_own_answers(client: openai.OpenAI, tiny: CAFe):
    """32 at once, embeddings of texts and images and answers, all in the same batches."""
    texts = [f"{n} red cats at the top left" for n in range(16)]
    want_texts = tiny.encode(texts)
    want_images = tiny.encode([sample_image(seed) for seed in range(8)])
    asks = [{"image": sample_image(seed), "text": DESCRIBE} for seed in range(8)]
    want_answers = [tiny.generate(ask, max_new_tokens=16) for ask in asks]
    assert len(set(want_answers)) > 4
    together = threading.Barrier(32)

    def ask(number: int) -> bool:
        together.wait(60)
        if number < 16:
            reply = client.embeddings.create(model="tiny", input=texts[number])
            return bool(np.abs(vectors(reply)[0] - want_texts[number]).max() < 1e-5)
        if number < 24:
            seed = number - 16
            reply = client.post(
                "/embeddings", body={"messages": shown(seed)}, cast_to=dict[str, Any]
            )
            found = np.array(reply["data"][0]["embedding"])
            return bool(np.abs(found - want_images[seed]).max() < 1e-5)
        seed = number - 24
        answer = client.chat.completions.create(
            model="tiny", messages=shown(seed, DESCRIBE), max_tokens=16
        )
        return answer.choices[0].message.content == want_answers[seed]

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(32))) == [True] * 32
