"""The text of an answer: its end, and what may be shown before the end."""

from __future__ import annotations

import pytest

from cafe.serving.detokenize import StreamDetokenizer, find_stop, partial_stop_length, stable_prefix
from cafe.serving.messages import Event, Prompt
from cafe.types import user

END = 0


def transcript(text: str, **fields) -> tuple[StreamDetokenizer, list[int]]:
    """A transcript whose tokens are characters, and the tokens of `text`."""
    limit = fields.pop("limit", 1000)
    prompt = Prompt(user("?"), max_new_tokens=limit, **fields)
    decode = lambda tokens: "".join(map(chr, tokens))  # noqa: E731
    row = StreamDetokenizer(
        0, prompt, decode, end_ids=frozenset({END}), limit=limit, prompt_tokens=7
    )
    return row, [*map(ord, text), END]


def events(text: str, **fields) -> list[Event]:
    row, tokens = transcript(text, **fields)
    found = []
    for token in tokens:
        found.append(row.add(token))
        if found[-1].answer is not None:
            break
    return found


@pytest.mark.parametrize(
    "text", ["", "cat", " two words ", "\n a  b\nc ", "你好 世界", "naïve — “q”", "x" * 50]
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_pieces_join_to_the_stripped_text(text: str, stream: bool):
    found = events(text, stream=stream)
    assert found[-1].answer is not None
    assert found[-1].answer.text == text.strip()
    assert found[-1].answer.finish_reason == "stop"
    assert found[-1].answer.new_tokens == len(text) + 1
    assert found[-1].answer.prompt_tokens == 7
    assert "".join(e.piece for e in found) == (text.strip() if stream else "")


def test_words_are_shown_when_they_are_whole():
    assert [e.piece for e in events("a big cat", stream=True) if e.piece] == ["a", " big", " cat"]


def test_scripts_without_spaces_are_shown_sign_by_sign():
    assert [e.piece for e in events("你好", stream=True) if e.piece] == ["你", "好"]


def test_half_a_sign_is_not_shown():
    assert stable_prefix("a b\ufffd") == "a "
    assert stable_prefix("你\ufffd") == ""


def test_the_limit_ends_an_answer():
    last = events("a big cat", limit=4, stream=True)[-1]
    assert last.answer is not None
    assert (last.answer.text, last.answer.finish_reason) == ("a bi", "length")
    assert last.answer.new_tokens == 4


def test_an_end_token_at_the_limit_is_a_stop():
    last = events("abc", limit=4)[-1]
    assert last.answer is not None
    assert (last.answer.text, last.answer.finish_reason) == ("abc", "stop")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["cat", " cat", "g c", "big cat"])
def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(stop: str, stream: bool):
    text = "a big cat and a dog"
    found = events(text, stop=(stop, "never"), stream=stream)
    assert found[-1].answer is not None
    want = text[: text.index(stop)].strip()
    assert (found[-1].answer.text, found[-1].answer.finish_reason) == (want, "stop")
    assert found[-1].answer.new_tokens == text.index(stop) + len(stop)
    assert "".join(e.piece for e in found) == (want if stream else "")


def test_the_first_stop_text_counts():
    assert find_stop("a b c", ("c", "b")) == 2
    assert find_stop("a b c", ("d",)) is None
    assert find_stop("a b c", ()) is None


def test_what_may_become_a_stop_text_is_held_back():
    assert partial_stop_length("a big c", ("cat", "big cat")) == len("big c")
    assert partial_stop_length("a dog", ("cat",)) == 0
    found = events("a big dog", stop=("big cat",), stream=True)
    assert "".join(e.piece for e in found) == "a big dog"
    assert not any(e.piece for e in found[2 : len("a big ")]), "it may become the stop text"
