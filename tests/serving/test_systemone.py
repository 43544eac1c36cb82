"""`/v1/systemone`: the same judgements as `/v1/decisions`, in another shape."""

from __future__ import annotations

from typing import Any

import pytest

from cafe.serving.run import Server
from helpers.fakes import request
from helpers.serving import message

STATE = "A red cat at the top left."
QUESTIONS: Any = {
    "cat": {"type": "noul", "instructions": "There is a cat."},
    "colour": {
        "type": "choice",
        "instructions": "Its colour?",
        "criteria": {"red": None, "blue": "as the sky"},
    },
    "size": {"type": "score", "instructions": "How big?", "criteria": ["small", "mid", "big"]},
}
SAME: Any = [
    {"type": "predicate", "instructions": "There is a cat."},
    {
        "type": "choice",
        "instructions": "Its colour?",
        "choices": [{"value": "red"}, {"value": "blue", "description": "as the sky"}],
    },
    {
        "type": "score",
        "instructions": "How big?",
        "levels": [{"label": one} for one in ("small", "mid", "big")],
    },
]


def test_answers_are_those_of_decisions(server: Server):
    status, reply, _ = request(server, "/v1/systemone", {"state": STATE, "questions": QUESTIONS})
    assert status == 200, reply
    want = request(server, "/v1/decisions", {"input": STATE, "questions": SAME})[1]
    cat, colour, size = (reply["answers"][name] for name in ("cat", "colour", "size"))
    one, two, three = want["answers"]
    assert cat == {"type": "noul", "noul": pytest.approx(one["probability"], abs=1e-6)}
    probabilities = [each["probability"] for each in two["probabilities"]]
    assert list(colour["probabilities"].values()) == pytest.approx(probabilities, abs=1e-6)
    assert colour["choice"] == two["choice"]
    assert colour["confidence"] == pytest.approx(2 * max(probabilities) - 1, abs=1e-6)
    assert size["score"] == pytest.approx(three["score"], abs=1e-6)
    assert size["legend"] == {"0": "small", "1": "mid", "2": "big"}
    assert sum(size["probabilities"].values()) == pytest.approx(1)
    assert 0 <= size["confidence"] <= 1
    assert reply["usage"]["input_tokens"] == want["usage"]["input_tokens"]


def test_a_state_may_be_json(server: Server):
    body = {"state": {"a": [1, None, {"b": "é"}]}, "questions": {"x": QUESTIONS["cat"]}}
    assert request(server, "/v1/systemone", body)[0] == 200


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"questions": {"a": {"type": "maybe"}}}, "questions.a.type: must be"),
        ({"questions": {}}, "questions: "),
        ({"questions": {"a": {"type": "choice"}}}, "questions.a: the criteria of a choice are an"),
        (
            {"questions": {"a": {"type": "score", "criteria": ["x"]}}},
            "questions.a: a score has 2 to 255 criteria",
        ),
        (
            {"questions": {"a": {"type": "noul", "criteria": {"no": "x"}}}},
            "questions.a: the criteria of a noul",
        ),
        (
            {"questions": {"a": {"type": "score", "criteria": ["x", ""]}}},
            "questions.a: a criterion of a score is empty",
        ),
        (
            {"questions": {"a": {"type": "choice", "criteria": {"x": None, "": None}}}},
            "questions.a: a criterion of a choice is empty",
        ),
        ({"assets": {"i": {"data_base64": ""}}, "questions": QUESTIONS}, "assets: not supported"),
    ],
)
def test_what_cannot_be_asked_is_refused(server: Server, body: Any, reason: str):
    status, reply, _ = request(server, "/v1/systemone", {"state": STATE} | body)
    assert status == 400
    assert message(reply).startswith(reason)
