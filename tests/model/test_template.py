"""Chat templates are programs of the checkpoint: bounded in work; an error names the file."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cafe.errors import CheckpointError, DataError
from cafe.model.rows import template as templates
from cafe.model.rows.prompts import turn_end
from cafe.model.rows.template import render_chat
from cafe.model.vlm import CAFe
from cafe.types import Message, user

TURN = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
TEN_BILLION = 10**10

ENDLESS = {
    "nested loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
}
HUGE = {
    "repetition": f"{{{{ 'x' * {TEN_BILLION} }}}}",
    "doubling": (
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}"
    ),
    "doubling in a block": (
        "{% set n = namespace(x='x') %}{% for i in range(60) %}"
        "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}"
    ),
    "doubling a list": (
        "{% set n = namespace(x=['x']) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
        "{% endfor %}"
    ),
    "a list that holds itself twice": (
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
        "{% endfor %}{{ n.x }}"
    ),
    "a width of a filter": f"{{{{ 'x' | center({TEN_BILLION}) }}}}",
    "a width of a method": f"{{{{ 'x'.ljust({TEN_BILLION}) }}}}",
    "a width of a format": f"{{{{ '%{TEN_BILLION}d' % 1 }}}}",
    "a width of a method's format": f"{{{{ '{{:{TEN_BILLION}d}}'.format(1) }}}}",
    "a width of a filter's format": f"{{{{ '%{TEN_BILLION}d' | format(1) }}}}",
    "replacements by a method": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replacements by a filter": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "separators of a method": "{{ ('b' * 99999).join(range(99999) | map('string')) }}",
    "separators of a filter": "{{ range(99999) | join('b' * 99999) }}",
    "the same item often": "{{ ''.join(['b' * 99999] * 99999) }}",
    "the same variable often": "{% set b = ['b' * 99999] %}{{ ''.join(b * 99999) }}",
    "the same field often": "{{ ('{0}' * 99999).format('b' * 99999) }}",
    "the same field often, by name": "{{ ('%(x)s' * 99999) % {'x': 'b' * 99999} }}",
    "indented lines": "{{ ('a\n' * 99999) | indent(99999) }}",
    "indented JSON": "{{ ([1] * 99999) | tojson(indent=99999) }}",
    "tabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "wrapped lines": "{{ ('a ' * 9999) | wordwrap(1, wrapstring='b' * 999999) }}",
    "words without sense": "{{ lipsum(99999) }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "long lines": f"{{% for i in range(99999) %}}{'y' * 1000}{{% endfor %}}",
}


def with_template(model: Any, template: str | None) -> Any:
    processor = copy.copy(model.processor)
    processor.chat_template = template
    return processor


@pytest.mark.parametrize("name", [*ENDLESS, *HUGE])
def test_a_template_without_bounds_is_one_error(small_model: Any, name: str) -> None:
    processor = with_template(small_model, (ENDLESS | HUGE)[name])
    with pytest.raises(CheckpointError, match="loops, or builds a huge text"):
        render_chat(processor, TURN)


def test_a_bound_that_only_long_conversations_meet(small_model: Any) -> None:
    processor = with_template(
        small_model, f"{{% if messages | length > 2 %}}{ENDLESS['nested loops']}{{% endif %}}hi"
    )
    assert render_chat(processor, TURN) == "hi"
    with pytest.raises(CheckpointError, match="of 3 turns"):
        render_chat(processor, TURN * 3)


def test_a_long_conversation_is_within_bounds(small_model: Any) -> None:
    turn = {"role": "user", "content": [{"type": "text", "text": "word " * 100}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "word " * 100}]}
    text = render_chat(small_model.processor, [turn, answer] * 1000)
    assert text.count("<|im_start|>") == 2000
    book = {"role": "user", "content": [{"type": "text", "text": "x" * 5_000_000}]}
    assert len(render_chat(small_model.processor, [book])) > 5_000_000


def test_a_shape_is_counted_once(small_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = with_template(small_model, "{{ messages[0]['content'][0]['text'] }}")
    counted: list[str] = []
    compiled = templates._compiled
    monkeypatch.setattr(templates, "_compiled", lambda text: counted.append(text) or compiled(text))
    other = [{"role": "user", "content": [{"type": "text", "text": "another text"}]}]
    assert [render_chat(processor, m) for m in (TURN, other)] == ["hello", "another text"]
    assert len(counted) == 1
    render_chat(processor, TURN * 2)
    assert len(counted) == 2


def test_extensions_of_transformers_are_known(small_model: Any) -> None:
    processor = with_template(
        small_model,
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        f"{{% if messages | length > 2 %}}{ENDLESS['nested loops']}{{% endif %}}",
    )
    assert render_chat(processor, TURN * 2) == json.dumps(TURN[0])
    with pytest.raises(CheckpointError, match="loops"):
        render_chat(processor, TURN * 3)


@pytest.mark.parametrize("name", ["repetition", "a width of a filter", "a power"])
def test_constants_are_bounded_where_the_program_never_gets_to(
    small_model: Any, name: str
) -> None:  # jinja2 computes them when it compiles
    processor = with_template(small_model, f"{{% if false %}}{HUGE[name]}{{% endif %}}hi")
    with pytest.raises(CheckpointError, match="loops, or builds a huge text"):
        render_chat(processor, TURN)


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{% for %}", CheckpointError, "not valid Jinja .*line 1"),
        ("{{ raise_exception('no such turn') }}", DataError, r"rejects this: no such turn \(turns"),
        ("{{ 1 / 0 }}", DataError, "rejects this: ZeroDivisionError, division by zero"),
        ("{{ messages[7]['role'] }}", DataError, "rejects this: .* has no element 7"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", DataError, "RecursionError"),
    ],
)
def test_other_errors_of_a_template_are_one_line(
    small_model: Any, template: str, error: type[Exception], message: str
) -> None:
    processor = with_template(small_model, template)
    with pytest.raises(error, match=message):
        render_chat(processor, TURN)
    with pytest.raises(CheckpointError, match=message):
        turn_end(processor)


def test_loading_names_the_file(small_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(small_dir, directory)
    (directory / "chat_template.jinja").write_text(ENDLESS["nested loops"])
    with pytest.raises(CheckpointError, match=rf"^{directory / 'chat_template.jinja'}: .*loops"):
        CAFe.from_pretrained(directory, device="cpu")


def test_a_template_without_the_answers_text_is_an_error(small_model: Any) -> None:
    model = CAFe(small_model.model, with_template(small_model, "hello")).eval()
    with pytest.raises(CheckpointError, match="does not write the text of an assistant turn"):
        model.collator.render.answers((*user("a"), Message("assistant", ("b",))))
