"""Calls of tools and what they return: from a record to what is trained."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cafe.data.read import read_examples
from cafe.data.records import ReadOptions, Records
from cafe.errors import DataError
from cafe.model.vlm import CAFe
from cafe.types import Conversation, Example, Message, ToolCall

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}},
}
TEMPLATE = """\
{% if tools %}T{{ tools | tojson }};{% endif %}\
{% for m in messages %}{{ m.role[0] | upper }}\
{% for part in m.content %}{{ part.text }}{% endfor %}\
{% for call in m.tool_calls %}({{ call.function.name }} {{ call.function.arguments | tojson }})\
{% endfor %};{% endfor %}{% if add_generation_prompt %}A{% endif %}"""
BLIND = TEMPLATE.replace("m.tool_calls", "[]")
QUIET = TEMPLATE.replace("for m in messages", "for m in messages if m.role != 'tool'")


def call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


ASKED = {"role": "user", "content": "Where is it warmer?"}
ANSWER = {"role": "assistant", "content": "In Rome."}
OPENAI = [
    ASKED,
    {"role": "assistant", "content": None, "tool_calls": [call("Paris"), call("Rome")]},
    {"role": "tool", "tool_call_id": "1", "content": "22"},
    {"role": "tool", "tool_call_id": "2", "content": "25"},
    ANSWER,
]
SWIFT = [
    ASKED,
    {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "Paris"}}'},
    {
        "role": "tool_call",
        "content": '{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}',
    },
    {"role": "tool_response", "content": "22"},
    {"role": "tool_response", "content": "25"},
    ANSWER,
]
SHAREGPT = [
    {"from": "human", "value": "Where is it warmer?"},
    {"from": "function_call", "value": '[{"name": "weather", "arguments": {"city": "Paris"}}, '
     '{"name": "weather", "arguments": {"city": "Rome"}}]'},
    {"from": "observation", "value": "22"},
    {"from": "observation", "value": "25"},
    {"from": "gpt", "value": "In Rome."},
]  # fmt: skip

BOTH = (
    ToolCall("weather", '{"city": "Paris"}'),
    ToolCall("weather", '{"city": "Rome"}'),
)
TURNS = (
    Message("user", ("Where is it warmer?",)),
    Message("assistant", (), calls=BOTH),
    Message("tool", ("22",)),
    Message("tool", ("25",)),
    Message("assistant", ("In Rome.",)),
)


def read(folder: Path, record: dict[str, Any], **options: Any) -> Records:
    (folder / "data.json").write_text(json.dumps([record]), encoding="utf-8")
    return read_examples(folder / "data.json", ReadOptions(**{"mode": "chat", **options}))


def dialogue(folder: Path, record: dict[str, Any]) -> Conversation:
    (example,) = read(folder, record).examples
    return example.dialogues[0]


def reason(records: Records) -> str:
    assert records.examples == []
    return records.skipped[0].reason


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER])])
@pytest.mark.parametrize("turns", [OPENAI, SWIFT, SHAREGPT])
def test_every_published_layout_reads_alike(tmp_path: Path, tools: Any, turns: Any):
    column = "conversations" if turns is SHAREGPT else "messages"
    offered, *rest = dialogue(tmp_path, {column: turns, "tools": tools})
    assert tuple(rest) == TURNS
    assert (offered.role, json.loads(offered.text)) == ("tools", [WEATHER])


def test_a_text_before_a_call_is_of_its_turn(tmp_path: Path):
    said = {"role": "assistant", "content": "Let me see."}
    for turns in (
        [ASKED, said, *SWIFT[1:]],
        [ASKED, {**said, "tool_calls": [call("Paris"), call("Rome")]}, *OPENAI[2:]],
    ):
        assert dialogue(tmp_path, {"messages": turns})[1] == Message(
            "assistant", ("Let me see.",), calls=BOTH
        )


def test_null_keys_that_a_table_adds_are_left_out(tmp_path: Path):
    """Parquet gives every object the keys of all."""
    function = {"name": "weather", "arguments": {"city": "Paris", "query": None}}
    tool = {**WEATHER, "description": None}
    turns = [ASKED, {"role": "assistant", "tool_calls": [{"function": function}]}, *OPENAI[2:]]
    offered, _, called, *_ = dialogue(tmp_path, {"messages": turns, "tools": [tool]})
    assert called.calls == BOTH[:1]
    assert json.loads(offered.text) == [WEATHER]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "assistant", "content": None}, "turn 2: content is null, expected text"),
        ({"role": "tool_call", "content": "weather("}, "turn 2: 'weather(' is not JSON"),
        ({"role": "tool_call", "content": '{"city": "Rome"}'}, "expected an object with a name"),
        (
            {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": "[1]"}]},
            "turn 2: arguments of weather: a list, expected an object",
        ),
        ({"role": "user", "tool_calls": [call("Rome")]}, "role is 'user', and only gpt calls"),
        ({"role": "tool", "content": ""}, "turn 2: the result is empty"),
        (
            {"role": "tool", "content": "<tool_response>\n22\n</tool_response>"},
            "turn 2: contains <tool_response>, which the chat template writes",
        ),
    ],
)
def test_a_malformed_turn_is_named(tmp_path: Path, turn: dict[str, Any], message: str):
    assert message in reason(read(tmp_path, {"messages": [ASKED, turn, ANSWER]}))


@pytest.mark.parametrize("tools", ["weather", 3, [3], {"name": "weather"}])
def test_tools_that_are_none_are_refused(tmp_path: Path, tools: Any):
    assert "'tools'" in reason(read(tmp_path, {"messages": OPENAI, "tools": tools}))


@pytest.mark.parametrize("options", [{"mode": "caption"}, {"mode": "pair"}, {"turns": "branches"}])
def test_other_modes_say_which_one_it_is(tmp_path: Path, options: dict[str, Any]):
    found = reason(read(tmp_path, {"messages": OPENAI}, **options))
    assert "trained with mode: chat and turns: conversation only" in found


# ---------------------------------------------------------------------- what is trained


def model_with(tiny: CAFe, template: str, **settings: Any) -> Any:
    processor = copy.copy(tiny.processor)
    processor.chat_template = template
    return replace(tiny.collator, processor=processor, **settings)


OFFERED = Message("tools", (json.dumps([WEATHER]),))
HEAD = f"T{json.dumps([WEATHER])};UWhere is it warmer?;A"
CALLS = '(weather {"city": "Paris"})(weather {"city": "Rome"});'


def test_every_assistant_turn_is_trained_after_all_before_it(small_model: CAFe):
    first, last = model_with(small_model, TEMPLATE).render.answers((OFFERED, *TURNS))
    assert first.text == HEAD + CALLS
    assert first.text[-first.labelled :] == CALLS
    assert last.text == f"{HEAD}{CALLS}T22;T25;AIn Rome.;"
    assert last.text[-last.labelled :] == "In Rome.;"


def test_a_text_and_its_calls_are_one_answer(small_model: CAFe):
    said = Message("assistant", ("Let me see.",), calls=BOTH)
    (answer,) = model_with(small_model, TEMPLATE).render.answers((TURNS[0], said))
    assert answer.text == f"UWhere is it warmer?;ALet me see.{CALLS}"
    assert answer.labelled == len(f"Let me see.{CALLS}")


@pytest.mark.parametrize(
    ("template", "turns", "what"),
    [
        (TEMPLATE.replace("if tools", "if false"), (OFFERED, *TURNS), "which tools there are"),
        (BLIND, TURNS, "calls of tools"),
        (BLIND, (OFFERED, *TURNS), "calls of tools"),
        (QUIET, TURNS, "what tools return"),
    ],
)
def test_a_template_that_leaves_something_out_is_named(
    small_model: CAFe, template: str, turns: Conversation, what: str
):
    with pytest.raises(DataError, match=rf"the chat template does not write {what}; train a model"):
        model_with(small_model, template).render.answers(turns)


def test_control_tokens_in_calls_and_tools_are_text(small_model: CAFe):
    turns = (TURNS[0], Message("assistant", (), calls=(ToolCall("f", '{"a": "<image>"}'),)))
    (answer,) = model_with(small_model, TEMPLATE).render.answers(turns)
    assert "<image>" not in answer.text
    assert answer.text.replace("\u200b", "").endswith('(f {"a": "<image>"});')


def test_a_long_result_is_cut_and_never_the_tools(small_model: CAFe):
    turns = (OFFERED, *TURNS[:2], Message("tool", ("word " * 400,)), TURNS[4])
    collator = model_with(small_model, TEMPLATE, max_tokens=300)
    rows = collator([Example("e", dialogues=(turns,))]).rows
    text = small_model.processor.tokenizer.decode(rows.input_ids[0])
    assert int(rows.positions.max()) + 1 == 300
    assert text.startswith(HEAD + CALLS + "Tword word")
    assert text.endswith("AIn Rome.;")


def test_the_published_code_has_no_tools(small_model: CAFe):
    with pytest.raises(DataError, match="the published code has no tools"):
        model_with(small_model, TEMPLATE, official=True).render.answers(TURNS)
