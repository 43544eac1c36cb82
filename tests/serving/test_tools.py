"""Tools in chats: what the template is told, what is read of an answer, calls that must be made."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from cafe.model.vlm import CAFe
from cafe.serving.tools import CallReader, read_calls, tool_support
from cafe.types import ToolCall
from helpers.fakes import Fake, chat, request, started
from helpers.serving import message

HERMES = """\
{% if tools %}<|im_start|>system
Call one of these: {% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% for part in m.content %}{{ part.text }}{% endfor %}{% for call in m.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
XML = HERMES.replace('{"name": "{{ call.function.name }}", "arguments":', "<function=x>")

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Rome", "Oslo"]}},
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
NEWLINE = "\n"
ASKED: Any = [{"role": "user", "content": "Where is it warmer?"}]


def with_template(model: CAFe, template: str) -> CAFe:
    """The same weights with another chat template."""
    other = copy.copy(model)
    other.processor = copy.copy(model.processor)
    other.processor.chat_template = template
    from dataclasses import replace

    other.collator = replace(model.collator, processor=other.processor)
    return other


@pytest.fixture(scope="module")
def server(tiny: CAFe) -> Iterator[Any]:
    from cafe.serving.model_calls import CafeCalls

    server = started(CafeCalls(with_template(tiny, HERMES)), name="tiny")
    yield server
    server.stop()


@pytest.fixture
def echo() -> Iterator[Any]:
    """A model that answers with the words that it is asked."""
    model = Fake()
    model.tools = "calls"
    server = started(model)
    yield server
    server.stop()


# ---------------------------------------------------------------------- reading


def test_calls_are_told_from_text():
    assert read_calls(f"I look.\n{CALL}\n{CALL.replace('Rome', 'Oslo')}\n") == (
        "I look.",
        [ToolCall("weather", '{"city": "Rome"}'), ToolCall("weather", '{"city": "Oslo"}')],
    )
    strings = '<tool_call>{"name": "a", "arguments": "{\\"b\\": 1}"}</tool_call>'
    assert read_calls(strings) == ("", [ToolCall("a", '{"b": 1}')])
    for text in ("no call", "a <tool_call>{}</tool_call>", CALL[:-3], "<tool_call>{</tool_call> b"):
        assert read_calls(text) == (text, [])


@pytest.mark.parametrize("size", [1, 2, 7])
def test_pieces_of_any_size_give_the_same(size: int):
    for text in (f"I look.\n{CALL}\n{CALL}", f"a < b <tool {CALL} c", CALL[:-3], "  spaces  in  "):
        reader = CallReader()
        found: list[Any] = []
        for at in range(0, len(text), size):
            found += reader.feed(text[at : at + size])
        found.append(reader.end())
        texts = "".join(one for one in found if isinstance(one, str))
        assert texts.strip() == read_calls(text)[0]
        assert [one for one in found if isinstance(one, ToolCall)] == read_calls(text)[1]


def test_a_template_says_what_it_makes_of_tools(tiny: CAFe):
    assert tool_support(tiny.processor) == "none"
    assert tool_support(with_template(tiny, HERMES).processor) == "calls"
    assert tool_support(with_template(tiny, XML).processor) == "unread"


# ---------------------------------------------------------------------- over HTTP


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "time"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_be_made_is_made(client: openai.OpenAI, choice: Any, stream: bool):
    """By a model that was never trained to: the grammar leaves it no other way."""
    fields: Any = {"tools": [WEATHER, TIME], "tool_choice": choice, "max_tokens": 150}
    if stream:
        pieces = [
            one.choices[0]
            for one in client.chat.completions.create(
                model="tiny", messages=ASKED, stream=True, **fields
            )
        ]
        (call,) = [c for one in pieces for c in one.delta.tool_calls or []]
        assert call.index == 0
        assert pieces[-1].finish_reason == "tool_calls"
    else:
        reply = client.chat.completions.create(model="tiny", messages=ASKED, **fields)
        assert reply.choices[0].finish_reason == "tool_calls"
        assert reply.choices[0].message.content is None
        (call,) = reply.choices[0].message.tool_calls or []
    function: Any = call.function  # type: ignore[union-attr]
    arguments = json.loads(function.arguments)
    if choice == "required":
        assert arguments in [{"city": "Rome"}, {"city": "Oslo"}, {}]
        assert (function.name == "weather") is bool(arguments)
    else:
        assert function.name == "time"
        assert arguments == {}


def test_a_call_and_its_result_are_read_again(client: openai.OpenAI):
    fields: Any = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 150}
    reply = client.chat.completions.create(model="tiny", messages=ASKED, **fields)
    answer = reply.choices[0].message
    assert answer.tool_calls
    result: Any = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "25"}
    again = client.chat.completions.create(
        model="tiny", messages=[*ASKED, answer, result], tools=[WEATHER], max_tokens=3
    )
    assert again.usage
    assert reply.usage
    assert again.usage.prompt_tokens > reply.usage.prompt_tokens


def test_tools_are_told_by_the_template_unless_none_is_chosen(client: openai.OpenAI):
    def tokens(**fields: Any) -> int:
        reply = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=1, **fields)
        return reply.usage.prompt_tokens if reply.usage else 0

    plain = tokens()
    assert tokens(tools=[WEATHER]) > plain + 50
    assert tokens(tools=[WEATHER], tool_choice="none") == plain
    assert tokens(tools=[]) == plain


def test_calls_in_an_answer_are_returned_and_streamed(echo: Any):
    text = f"I look. {CALL.replace(NEWLINE, '')} {CALL.replace('Rome', 'Oslo')}"
    with openai.OpenAI(base_url=f"{echo.url}/v1", api_key="any", max_retries=0) as client:
        fields: Any = {"model": "fake", "messages": [{"role": "user", "content": text}]}
        plain = client.chat.completions.create(**fields)
        assert plain.choices[0].message.content == text
        assert plain.choices[0].finish_reason == "stop"
        fields["tools"] = [WEATHER]
        reply = client.chat.completions.create(**fields).choices[0]
        assert reply.finish_reason == "tool_calls"
        assert reply.message.content == "I look."
        names = [json.loads(c.function.arguments)["city"] for c in reply.message.tool_calls or []]
        assert names == ["Rome", "Oslo"]
        one = client.chat.completions.create(parallel_tool_calls=False, **fields).choices[0]
        assert len(one.message.tool_calls or []) == 1
        pieces = [one.choices[0] for one in client.chat.completions.create(stream=True, **fields)]
        assert "".join(one.delta.content or "" for one in pieces) == "I look."
        calls = [c for one in pieces for c in one.delta.tool_calls or []]
        assert [json.loads(c.function.arguments)["city"] for c in calls] == names
        assert [c.index for c in calls] == [0, 1]
        assert pieces[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools: two of them have the same name"),
        ({"tool_choice": "required"}, "tool_choice: there are no tools"),
        (
            {"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice: there is no tool 'x'",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type: must be 'function'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "a", "parameters": {"type": "no"}}}
                ],
                "tool_choice": "required",
            },
            "tools: ",
        ),
    ],
)
def test_tools_that_cannot_be_are_refused(server: Any, fields: Any, reason: str):
    status, reply, _ = request(server, "/v1/chat/completions", chat("hi", max_tokens=2, **fields))
    assert status == 400
    assert message(reply).startswith(reason)


def test_a_model_without_tools_says_so():
    for support, reason in {"none": "has no tools", "unread": "in another form"}.items():
        model = Fake()
        model.tools = support
        server = started(model)
        status, reply, _ = request(server, "/v1/chat/completions", chat("hi", tools=[TIME]))
        server.stop()
        assert status == 400
        assert reason in message(reply)
