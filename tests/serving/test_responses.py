"""`/v1/responses` by the real `openai` client; `/tokenize` and `/detokenize` in vLLM's shape."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from cafe.model.vlm import CAFe
from cafe.serving.run import Server
from helpers.fakes import data_uri, request
from helpers.images import sample_image
from helpers.serving import message

ASKED: Any = {"model": "tiny", "max_output_tokens": 12}


def shown() -> Any:
    image = {"type": "input_image", "image_url": data_uri(sample_image(1)), "detail": "auto"}
    text = {"type": "input_text", "text": "Describe this image."}
    return [{"role": "user", "content": [image, text]}]


def test_an_answer_is_the_one_of_generate(client: openai.OpenAI, tiny: CAFe):
    reply = client.responses.create(input=shown(), **ASKED)
    want = tiny.generate(
        {"image": sample_image(1), "text": "Describe this image."}, max_new_tokens=12
    )
    assert reply.output_text == want
    assert want
    assert reply.usage
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert reply.status in ("completed", "incomplete")


def test_a_stream_has_the_same_text_in_openais_order_of_events(client: openai.OpenAI):
    whole = client.responses.create(input=shown(), **ASKED)
    events = list(client.responses.create(input=shown(), stream=True, **ASKED))
    kinds = [one.type for one in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    deltas = [one.delta for one in events if one.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    last: Any = events[-1]
    assert last.response.output_text == whole.output_text
    assert [one.sequence_number for one in events] == list(range(len(events)))


def test_instructions_and_an_earlier_answer_are_read(client: openai.OpenAI):
    plain = client.responses.create(input="hi", **ASKED)
    told = client.responses.create(input="hi", instructions="Be brief.", **ASKED)
    again = client.responses.create(
        input=[{"role": "user", "content": "hi"}, *plain.output, {"role": "user", "content": "a"}],  # type: ignore[list-item]
        **ASKED,
    )
    counts = [one.usage.input_tokens for one in (plain, told, again) if one.usage]
    assert counts[0] < counts[1]
    assert counts[0] < counts[2]


def test_a_schema_is_kept_to(client: openai.OpenAI):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form: Any = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
    fields = ASKED | {"max_output_tokens": 60}
    reply = client.responses.create(input="hi", text=form, **fields)
    assert reply.output_text in ('{"a": "x"}', '{"a": "y"}')


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"input": "a", "previous_response_id": "x"}, "previous_response_id: not supported here"),
        ({"input": []}, "input: needs at least one item"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools.0.type: must be 'function'"),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"input": "a", "tools": [{"type": "function", "name": "f"}]}, "tools: the model's chat"),
    ],
)
def test_what_would_change_the_answer_is_refused(server: Server, body: Any, reason: str):
    status, reply, _ = request(server, "/v1/responses", body)
    assert status == 400
    assert message(reply).startswith(reason)


# ---------------------------------------------------------------------- tokens


def test_texts_become_tokens_and_texts_again(server: Server, tiny: CAFe):
    text = "a red cat, naïve 你好"
    reply = request(server, "/tokenize", {"prompt": text, "return_token_strs": True})[1]
    want = tiny.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert reply["tokens"] == want
    assert reply["count"] == len(want) == len(reply["token_strs"])
    assert reply["max_model_len"] == tiny.collator.max_tokens
    assert request(server, "/detokenize", {"tokens": want})[1] == {"prompt": text}
    assert request(server, "/detokenize", {"tokens": []})[1] == {"prompt": ""}


def test_the_tokens_of_a_chat_are_those_that_are_read(server: Server):
    chat = {"messages": [{"role": "user", "content": "hi <|im_end|>"}]}
    count = request(server, "/tokenize", chat)[1]["count"]
    answer = request(server, "/v1/chat/completions", chat | {"max_tokens": 1})[1]
    assert count == answer["usage"]["prompt_tokens"]


def test_wrong_bodies_are_refused(server: Server):
    part = {"type": "image_url", "image_url": data_uri(sample_image(1))}
    image = [{"role": "user", "content": [part]}]
    for path, body, reason in [
        ("/tokenize", {}, "give either"),
        ("/tokenize", {"messages": image}, "messages: an image's tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens: token 1,000,000,000 is not"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0: must be at least 0"),
    ]:
        status, reply, _ = request(server, path, body)
        assert status == 400
        assert message(reply).startswith(reason)
