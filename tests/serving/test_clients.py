"""Other makers' real clients, and the bodies of those that are too heavy to install."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openai
import pydantic
import pytest
import torch

from cafe.model import judging
from cafe.model.multi_vector import add_token_projection, new_token_projection
from cafe.model.quantization import quantized
from cafe.model.vlm import CAFe
from cafe.serving.model_calls import CafeCalls
from cafe.serving.routes.decisions import confidence
from cafe.serving.run import Server
from cafe.types import Image, Message, user
from helpers.fakes import data_uri, request, started
from helpers.images import noise, sample_image

TEXTS = ["a red cat", "two dogs at the top left", "naïve “q” 你好"]


def part(seed: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(sample_image(seed))}}


def post(server: Server, path: str, body: Any) -> Any:
    status, reply, _ = request(server, path, body)
    assert status == 200, reply
    return reply


def same(found: Any, want: np.ndarray) -> bool:
    return bool(np.abs(np.array(found, dtype=np.float32) - want).max() < 1e-5)


# ---------------------------------------------------------------------- Cohere


@pytest.fixture(scope="module")
def co(server: Server) -> Any:
    cohere = pytest.importorskip("cohere")
    return cohere.ClientV2(api_key="any", base_url=server.url, timeout=120)


def test_cohere_embeds_texts_and_images(co: Any, tiny: CAFe):
    kinds = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    reply = co.embed(model="tiny", texts=TEXTS, input_type="search_document", embedding_types=kinds)
    want = tiny.encode(TEXTS)
    found = reply.embeddings
    assert same(found.float_, want)
    assert reply.texts == TEXTS
    assert reply.meta.api_version.version == "2"
    most = 4 / math.sqrt(want.shape[1])
    ranges = np.stack([np.full(want.shape[1], -most), np.full(want.shape[1], most)])
    for kind in ("int8", "uint8", "binary", "ubinary"):
        expected = quantized(want, kind, ranges.astype(np.float32))  # pyright: ignore[reportArgumentType]
        distance = np.abs(np.array(getattr(found, kind), dtype=int) - expected.astype(int))
        assert (distance > 0).mean() < 0.01, kind  # a value may be on the edge of a step
    steps = np.array(found.int8) / np.linalg.norm(found.int8, axis=1, keepdims=True)
    assert (steps * want).sum(1).min() > 0.99
    decoded = [np.frombuffer(base64.b64decode(one), "<f4") for one in found.base64]
    assert same(decoded, want)
    images = [data_uri(sample_image(seed)) for seed in (1, 2)]
    reply = co.embed(
        model="tiny",
        images=images,
        input_type="image",
        embedding_types=["float"],
        output_dimension=16,
    )
    assert same(
        reply.embeddings.float_, tiny.encode([sample_image(1), sample_image(2)], truncate_dim=16)
    )
    both = [{"content": [part(1), {"type": "text", "text": "a red cat"}]}]
    reply = co.embed(
        model="tiny", inputs=both, input_type="search_query", embedding_types=["float"]
    )
    assert same(
        reply.embeddings.float_, tiny.encode([{"image": sample_image(1), "text": "a red cat"}])
    )


def test_cohere_cuts_long_texts_as_encode_does_unless_told_not_to(co: Any, tiny: CAFe):
    import cohere

    for text in ("cat " * 3000, "word " * 40_000):
        reply = co.embed(model="tiny", texts=["a", text], input_type="x", embedding_types=["float"])
        assert same(reply.embeddings.float_, tiny.encode(["a", text]))
    with pytest.raises(cohere.BadRequestError, match="exceed the model's limit"):
        co.embed(
            model="tiny", texts=[text], input_type="x", embedding_types=["float"], truncate="NONE"
        )


def test_cohere_reranks_texts(co: Any, server: Server, tiny: CAFe):
    want = tiny.rerank(TEXTS[0], TEXTS).posterior
    reply = co.rerank(model="tiny", query=TEXTS[0], documents=TEXTS, top_n=2)
    assert [one.index for one in reply.results] == np.argsort(-want, kind="stable")[:2].tolist()
    assert same([r.relevance_score for r in reply.results], np.sort(want)[::-1][:2])
    cohere = pytest.importorskip("cohere")
    older = cohere.Client(api_key="any", base_url=server.url).rerank(
        model="tiny", query=TEXTS[0], documents=TEXTS, return_documents=True
    )
    assert older.results[0].document.text == TEXTS[older.results[0].index]


# ---------------------------------------------------------------------- LangChain, OpenAI


def test_langchain_embeds_and_answers(server: Server, tiny: CAFe):
    langchain = pytest.importorskip("langchain_openai")
    url: Any = f"{server.url}/v1"
    given: dict[str, Any] = {"base_url": url, "api_key": "any", "model": "tiny"}
    embeddings = langchain.OpenAIEmbeddings(**given, check_embedding_ctx_length=False)
    assert same(embeddings.embed_documents(TEXTS), tiny.encode(TEXTS))
    chat = langchain.ChatOpenAI(**given, temperature=0, max_tokens=12)
    assert chat.invoke("What is red?").content == tiny.generate("What is red?", max_new_tokens=12)
    pieces = [chunk.content for chunk in chat.stream("What is red?")]
    assert "".join(map(str, pieces)) == tiny.generate("What is red?", max_new_tokens=12)
    with_image = [("human", [{"type": "text", "text": "What?"}, part(1)])]
    assert chat.bind(logprobs=True).invoke(with_image).response_metadata["logprobs"]["content"]


def test_langchain_sends_tokens_of_the_models_own_tokenizer(tiny: CAFe, tmp_path: Path):
    """Its default without tiktoken: it makes lists of tokens, and averages the parts of a text."""
    langchain = pytest.importorskip("langchain_openai")
    tiny.save_pretrained(tmp_path / "m")
    server = started(CafeCalls(tiny), name=str(tmp_path / "m"))
    try:
        url: Any = f"{server.url}/v1"
        embeddings = langchain.OpenAIEmbeddings(
            base_url=url, api_key="any", model=str(tmp_path / "m"), tiktoken_enabled=False
        )
        assert same(embeddings.embed_documents(TEXTS), tiny.encode(TEXTS))
    finally:
        server.stop()


def test_tokens_are_read_as_their_text(client: openai.OpenAI, tiny: CAFe):
    ids = [tiny.processor.tokenizer(t, add_special_tokens=False)["input_ids"] for t in TEXTS]
    want = tiny.encode(TEXTS)
    many = client.embeddings.create(model="tiny", input=ids)
    assert same([one.embedding for one in many.data], want)
    one = client.embeddings.create(model="tiny", input=ids[1])
    assert same(one.data[0].embedding, want[1])


@pytest.mark.parametrize("kind", ["float", "int8", "uint8", "binary", "ubinary"])
def test_types_of_numbers(server: Server, tiny: CAFe, kind: str):
    body = {"model": "tiny", "input": TEXTS[0], "dimensions": 64}
    sent = post(server, "/v1/embeddings", body | {"output_dtype": kind})["data"][0]["embedding"]
    assert len(sent) == (8 if "binary" in kind else 64)
    assert post(server, "/v1/embeddings", body | {"embedding_types": [kind]})["data"][0] == {
        "object": "embedding",
        "index": 0,
        "embedding": sent,
    }
    reply = post(
        server, "/v1/embeddings", body | {"output_dtype": kind, "encoding_format": "base64"}
    )
    form = {"float": "<f4", "int8": "i1", "binary": "i1"}.get(kind, "u1")
    assert np.frombuffer(
        base64.b64decode(reply["data"][0]["embedding"]), form
    ).tolist() == pytest.approx(sent)


def test_a_chats_penalties_and_biases(client: openai.OpenAI, tiny: CAFe):
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [
            {"role": "user", "content": [part(1), {"type": "text", "text": "Describe this image."}]}
        ],
        "max_tokens": 24,
    }

    def answer(**fields: Any) -> Any:
        return client.chat.completions.create(**asked, **fields).choices[0]

    plain = answer(logprobs=True, top_logprobs=3)
    places = plain.logprobs.content
    assert "".join(one.token for one in places).strip() == plain.message.content
    assert all(one.logprob == one.top_logprobs[0].logprob for one in places), "greedy"
    assert all(len(one.top_logprobs) == 3 for one in places)
    # The first token, against the model's own distribution.
    conversation = [{"image": sample_image(1), "text": "Describe this image."}]
    from cafe.model.rows.inputs import as_messages

    rows, vision = tiny.collator.prompt_rows(as_messages(conversation))
    log_p = tiny.lm_head(tiny.hidden_at(rows, vision)).detach()[0].float().log_softmax(-1)
    assert places[0].logprob == pytest.approx(float(log_p.max()), abs=1e-4)
    first = int(log_p.argmax())
    banned = answer(logit_bias={str(first): -100}, logprobs=True)
    assert banned.logprobs.content[0].token != places[0].token
    second = float(log_p.topk(2).values[1])
    assert banned.logprobs.content[0].logprob == pytest.approx(second, abs=1e-4)
    assert answer(frequency_penalty=0.0).message.content == plain.message.content
    for name in ("frequency_penalty", "presence_penalty"):
        assert answer(**{name: 2.0}).message.content != plain.message.content
    stopped = answer(stop=[plain.message.content.split()[3]], logprobs=True)
    text = "".join(one.token for one in stopped.logprobs.content)
    assert text.strip().startswith(stopped.message.content)
    assert len(text) <= len(stopped.message.content) + 8
    stream = client.chat.completions.create(**asked, stream=True, logprobs=True)
    last = next(chunk for chunk in stream if chunk.choices[0].finish_reason).choices[0]
    assert last.logprobs is not None
    assert [one.token for one in last.logprobs.content or []] == [one.token for one in places]


def test_several_answers(client: openai.OpenAI):
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "What is red?"}],
        "max_tokens": 8,
    }
    greedy = client.chat.completions.create(**asked, n=2)
    assert [c.index for c in greedy.choices] == [0, 1]
    assert len({c.message.content for c in greedy.choices}) == 1
    one = client.chat.completions.create(**asked)
    assert one.usage is not None
    assert greedy.usage is not None
    assert greedy.usage.prompt_tokens == one.usage.prompt_tokens
    sampled = [
        [
            c.message.content
            for c in client.chat.completions.create(**asked, n=4, seed=7, temperature=1.5).choices
        ]
        for _ in range(2)
    ]
    assert sampled[0] == sampled[1]
    assert len(set(sampled[0])) > 1
    third = client.chat.completions.create(**asked, seed=9, temperature=1.5)
    assert third.choices[0].message.content == sampled[0][2]
    pieces = client.chat.completions.create(**asked, n=2, stream=True)
    streamed = ["", ""]
    for piece in pieces:
        for choice in piece.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == [c.message.content for c in greedy.choices][:2]


COLOUR: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer"}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def formatted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}


@pytest.mark.parametrize("more", [{}, {"temperature": 1.5, "seed": 1, "n": 4}, {"stream": True}])
def test_an_answer_is_json_of_the_schema(client: openai.OpenAI, more: Any):
    form = formatted(COLOUR | {"properties": COLOUR["properties"] | {"count": {"enum": [1, 23]}}})
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [part(1), {"type": "text", "text": "Colour?"}]}],
        "max_tokens": 60,
        "response_format": form,
    }
    if "stream" in more:
        chunks = client.chat.completions.create(**asked, stream=True)
        texts = ["".join(c.choices[0].delta.content or "" for c in chunks)]
    else:
        reply = client.chat.completions.create(**asked, **more)
        assert {choice.finish_reason for choice in reply.choices} == {"stop"}
        texts = [choice.message.content or "" for choice in reply.choices]
    for text in texts:
        value = json.loads(text)
        assert list(value) == ["colour", "count"]
        assert (value["colour"] in {"red", "blue"}, value["count"] in {1, 23}) == (True, True)


def test_openais_parse_and_any_json_object(client: openai.OpenAI):
    class Colour(pydantic.BaseModel):
        colour: Literal["red", "blue"]

    asked: Any = [{"role": "user", "content": "Which colour?"}]
    parsed = client.chat.completions.parse(
        model="tiny", messages=asked, response_format=Colour, max_tokens=40
    )
    answer = parsed.choices[0].message.parsed
    assert answer is not None
    assert answer.colour in {"red", "blue"}
    reply = client.chat.completions.create(
        model="tiny", messages=asked, response_format={"type": "json_object"}, max_tokens=5
    )
    assert (reply.choices[0].message.content or "").startswith("{")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "nonsense"}, "Invalid type: nonsense"),
        ({"type": "string", "pattern": "("}, "regex parse error"),
        ({"$ref": "http://10.0.0.1/a"}, "does not fetch resources"),
        ({"$ref": "file:///etc/passwd"}, "does not fetch resources"),
        ({"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnopqrst"]},
         "at most 8 patterns and formats, not 20"),
        ({"properties": {f"k{i}": {"type": "string"} for i in range(20_000)}}, "schema too large"),
        (json.loads('{"items":' * 400 + "{}" + "}" * 400), "recursion limit"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_used_is_refused(server: Server, schema: Any, message: str):
    body = {"messages": [{"role": "user", "content": "a"}], "response_format": formatted(schema)}
    status, reply, _ = request(server, "/v1/chat/completions", body)
    assert (status, reply["error"]["param"]) == (400, "response_format"), reply
    assert message in reply["error"]["message"]


def test_a_schema_is_needed(server: Server):
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "response_format": {"type": "json_schema"},
    }
    status, reply, _ = request(server, "/v1/chat/completions", body)
    assert (status, reply["error"]["param"]) == (400, "response_format.json_schema")


def test_a_history_with_tools_is_read(client: openai.OpenAI):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    history: list[Any] = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    assert client.chat.completions.create(model="tiny", messages=history, max_tokens=3).choices
    call["function"] = {"name": "add", "arguments": "[]"}
    with pytest.raises(openai.BadRequestError, match="must be a JSON object"):
        client.chat.completions.create(model="tiny", messages=history, max_tokens=3)


def test_low_detail_is_a_smaller_image(client: openai.OpenAI, server: Server, tiny: CAFe):
    image = noise(3, 40, 40).resize((600, 600))

    def embedded(detail: str) -> list[float]:
        shown = {"type": "image_url", "image_url": {"url": data_uri(image), "detail": detail}}
        return post(server, "/v1/embeddings", {"input": [shown]})["data"][0]["embedding"]

    assert same(embedded("high"), tiny.encode(image))
    assert same(embedded("low"), tiny.encode(Image(image, 512 * 512)))  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert not same(embedded("low"), tiny.encode(image))


# ---------------------------------------------------------------------- decisions


def test_decisions_are_probabilities_of_what_the_model_would_answer(
    client: openai.OpenAI, tiny: CAFe
):
    url = data_uri(sample_image(1))
    shown: Any = [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]
    questions: list[Any] = [
        {"type": "predicate", "name": "a", "instructions": "There is a cat."},
        {
            "type": "choice",
            "instructions": "Which?",
            "choices": [{"value": "red", "description": "like blood"}, {"value": True}],
        },
        {"type": "score", "instructions": "How big?", "levels": [{"label": n} for n in "abc"]},
    ]
    reply = client.decisions.create(model="tiny", input=shown, questions=questions)
    predicate, choice, score = reply.answers
    image = Image(sample_image(1))
    asked = user(image, "\n", "There is a cat.", "\nIs this true? Answer yes or no.")
    odds = float(judging.log_odds(tiny, [asked], 1)[0])
    assert predicate.type == "predicate"
    assert predicate.name == "a"
    assert predicate.probability == pytest.approx(1 / (1 + math.exp(-odds)), abs=1e-5)
    listed = "\nAnswer with one of these:\n- red: like blood\n- true"
    dialogue = user(image, "\n", "Which?", listed)
    both = [(*dialogue, Message("assistant", (text,))) for text in ("red", "true")]
    want = judging.log_likelihood(tiny, both, 2).softmax(0).numpy()
    assert choice.type == "choice"
    assert same([one.probability for one in choice.probabilities], want)
    assert [one.value for one in choice.probabilities] == ["red", True]
    assert choice.choice == ("red" if want[0] > want[1] else True)
    assert choice.confidence == pytest.approx(confidence(want), abs=1e-5)
    assert score.type == "score"
    p = [one.probability for one in score.probabilities]
    assert [(one.value, one.label) for one in score.probabilities] == [(0, "a"), (1, "b"), (2, "c")]
    assert score.score == pytest.approx(p[1] + 2 * p[2])
    assert reply.usage.output_tokens == 0
    assert confidence(np.array([0.5, 0.5])) == 0
    assert confidence(np.array([1.0, 0.0])) == 1


def test_langchains_decisions(server: Server):
    module = pytest.importorskip("langchain_openai.decisions")
    url: Any = f"{server.url}/v1"
    decisions = module.OpenAIDecisions(model="tiny", base_url=url, api_key="any")
    reply = decisions.invoke(
        {
            "input": "I was charged twice.",
            "questions": {
                "team": module.Choice(
                    instructions="Who?", choices={"billing": "Money.", "other": None}
                ),
                "angry": module.Predicate(instructions="The writer is angry."),
            },
        }
    )
    assert sum(reply.choices["team"].probabilities.values()) == pytest.approx(1)
    assert 0 < reply.predicates["angry"].probability < 1


# ---------------------------------------------------------------------- Hugging Face, TEI


def test_hugging_faces_client(server: Server, tiny: CAFe, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import InferenceClient, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # this server is not the hub
    embedder = InferenceClient(model=f"{server.url}/embed", token="any")
    assert same(embedder.feature_extraction(TEXTS[0]), tiny.encode([TEXTS[0]]))
    cut = embedder.feature_extraction("cat " * 3000, truncate=True, normalize=True)
    assert same(cut, tiny.encode(["cat " * 3000]))
    chat = InferenceClient(base_url=server.url, token="any")
    asked: list[Any] = [{"role": "user", "content": "What is red?"}]
    answer = chat.chat_completion(asked, model="tiny", max_tokens=12)
    assert answer.choices[0].message.content == tiny.generate("What is red?", max_new_tokens=12)


def test_tei(server: Server, tiny: CAFe):
    assert same(post(server, "/embed", {"inputs": TEXTS, "truncate": True}), tiny.encode(TEXTS))
    raw = post(server, "/embed", {"inputs": TEXTS[0], "normalize": False})
    assert same(raw, tiny.encode(TEXTS[:1], normalize=False)) or np.allclose(
        raw, tiny.encode(TEXTS[:1], normalize=False), rtol=1e-4
    )
    body = {"query": TEXTS[0], "texts": TEXTS, "return_text": True, "truncate": True}
    reply = post(server, "/rerank", body | {"raw_scores": False})
    want = tiny.rerank(TEXTS[0], TEXTS).posterior
    assert [one["index"] for one in reply] == np.argsort(-want, kind="stable").tolist()
    assert same([one["score"] for one in reply], np.sort(want)[::-1])
    assert [one["text"] for one in reply] == [TEXTS[one["index"]] for one in reply]
    status, reply, _ = request(server, "/embed_all", {"inputs": "a"})
    assert (status, "no token vectors" in reply["error"]["message"]) == (400, True)


# ---------------------------------------------------------------------- by their bodies


def test_llama_index_jina_infinity_and_vllm_embed(server: Server, tiny: CAFe):
    want = tiny.encode(["a red cat"])
    with_image = tiny.encode([{"image": sample_image(1), "text": "a red cat"}])
    url = data_uri(sample_image(1))
    for body, expected in [
        ({"input": ["a red cat"], "model": "tiny", "encoding_format": "float", "user": None}, want),
        (
            {"input": [{"text": "a red cat"}], "task": "retrieval.query", "late_chunking": False},
            want,
        ),
        ({"input": [{"text": "a red cat", "image": url}]}, with_image),
        ({"input": [{"type": "text", "text": "a red cat"}]}, want),
        ({"input": {"content": [part(1), {"type": "text", "text": "a red cat"}]}}, with_image),
        ({"input": ["a red cat"], "priority": 0, "embed_dtype": "float32"}, want),
    ]:
        assert same(post(server, "/v1/embeddings", body)["data"][0]["embedding"], expected[0])
    infinity = {"input": [url], "modality": "image", "model": "tiny"}
    found = post(server, "/embeddings", infinity)["data"][0]["embedding"]
    assert same(found, tiny.encode(sample_image(1)))
    pooled = post(server, "/pooling", {"input": "a red cat", "model": "tiny"})["data"][0]
    assert pooled["object"] == "pooling"
    assert same(pooled["data"], want[0])
    status, reply, _ = request(server, "/pooling", {"input": "a", "task": "token_embed"})
    assert (status, "no token vectors" in reply["error"]["message"]) == (400, True)


def test_instructions_are_system_turns(server: Server, tiny: CAFe):
    told = [{"role": "system", "content": "Find cats."}, {"role": "user", "content": "a red cat"}]
    body = {"input": ["a red cat"], "instruction": "Find cats."}
    found = post(server, "/v1/embeddings", body)["data"][0]["embedding"]
    assert same(found, tiny.encode([told])[0])
    assert not same(found, tiny.encode("a red cat"))
    asked = {"query": "a red cat", "documents": TEXTS}
    scores = [
        [one["match"] for one in post(server, "/v1/rerank", asked | more)["results"]]
        for more in ({}, {"instruction": "Find cats."}, {"instruct": "Find cats."})
    ]
    assert scores[1] == pytest.approx(scores[2], abs=1e-6)
    assert scores[0] != pytest.approx(scores[1], abs=1e-6)


def test_scores_of_one_with_many_and_of_each_with_its_own(server: Server, tiny: CAFe):
    image = {"content": [part(1)]}
    one = post(server, "/score", {"text_1": TEXTS[0], "text_2": [*TEXTS, image]})
    assert same([d["score"] for d in one["data"]], tiny.score(TEXTS[0], [*TEXTS, sample_image(1)]))
    pairs = post(server, "/v1/score", {"queries": [image, TEXTS[1]], "documents": TEXTS[:2]})
    want = [tiny.score(sample_image(1), TEXTS[0])[0], tiny.score(TEXTS[1], TEXTS[1])[0]]
    assert same([d["score"] for d in pairs["data"]], np.array(want))
    status, reply, _ = request(server, "/score", {"queries": TEXTS, "documents": TEXTS[:2]})
    assert (status, reply["error"]["param"]) == (400, "queries")


def test_images_and_pages_are_reranked(server: Server, tiny: CAFe):
    page = {"image": sample_image(2), "text": "a page"}
    documents: list[Any] = ["a dog", sample_image(1), page]
    sent = ["a dog", {"content": [part(1)]}, {"image": data_uri(sample_image(2)), "text": "a page"}]
    for query, shown in ("a cat", "a cat"), (sample_image(3), {"content": [part(3)]}):
        reply = post(server, "/v2/rerank", {"query": shown, "documents": sent, "top_n": 0})
        want = tiny.rerank(query, documents)
        order = np.argsort(-want.posterior, kind="stable")
        assert [one["index"] for one in reply["results"]] == order.tolist()
        assert want.match is not None
        assert same([one["match"] for one in reply["results"]], want.match[order])


def test_vectors_of_tokens_are_those_of_encode_tokens():
    model = CAFe.from_pretrained("tiny")
    torch.manual_seed(0)
    add_token_projection(model.model, new_token_projection(model.embedding_dimension, 16))
    inputs: list[Any] = [TEXTS[0], sample_image(1)]
    want = model.encode_tokens(inputs)
    assert want[0].shape[1] == 16
    sent = [TEXTS[0], {"image": data_uri(sample_image(1))}]
    server = started(CafeCalls(model), name="tiny")
    try:
        for task in ({}, {"task": "token_embed"}):
            reply = post(server, "/pooling", {"input": sent} | task)
            assert all(same(d["data"], w) for d, w in zip(reply["data"], want, strict=True))
        dense = post(server, "/pooling", {"input": TEXTS[0], "task": "embed"})["data"][0]["data"]
        assert same(dense, model.encode(TEXTS[0]))
        whole = post(server, "/pooling", {"input": TEXTS[0], "encoding_format": "base64"})
        flat = np.frombuffer(base64.b64decode(whole["data"][0]["data"]), "<f4")
        assert same(flat.reshape(-1, 16), want[0])
        every = post(server, "/embed_all", {"inputs": TEXTS})
        for found, vectors in zip(every, model.encode_tokens(TEXTS), strict=True):
            assert same(found, vectors)
    finally:
        server.stop()


def test_llama_index_embeds_as_encode_does(server: Server, tiny: CAFe):
    embeddings = pytest.importorskip("llama_index.embeddings.openai")
    client = embeddings.OpenAIEmbedding(
        model_name="tiny", api_base=f"{server.url}/v1", api_key="any", max_retries=0
    )
    found = client.get_text_embedding_batch(["a red cat", "two dogs"])
    assert np.abs(np.array(found) - tiny.encode(["a red cat", "two dogs"])).max() < 1e-5
    query = client.get_query_embedding("a red cat")
    assert np.abs(np.array(query) - tiny.encode("a red cat")).max() < 1e-5
