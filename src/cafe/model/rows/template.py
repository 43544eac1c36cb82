"""Runs a model's chat template, which is a program that came with the checkpoint, within bounds.

Jinja's sandbox keeps a template from files and from code, not from endless work: nested loops over
`range(99999)`, a text that is doubled forty times. Before transformers renders a conversation of a
new shape (roles, kinds of parts), the same program runs here with its work counted: each item of a
loop, each call and each character that it makes is paid for from a budget that grows with the
conversation. Counting needs no second process and no clock, so it ends the same way on every
machine; and a shape is counted once, so that rendering costs what it did.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from cafe.errors import CheckpointError, DataError, first_line

WORK = 2_000_000
"""Budget of a rendering, in characters and items made; in addition to `WORK_PER_CHARACTER`."""

WORK_PER_CHARACTER = 100
"""A template may look at each character of the conversation about this often."""

STEP, CALL = 10, 50
"""What one item of a loop and one call cost: about a second for all of `WORK`."""

_LARGEST_NUMBER = 1_000_000
"""A longer text than this is never asked for by a number (`text | center(n)`, `'%9d' % n`)."""

_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_SHAPES = 1024  # shapes of conversations that are remembered

Messages = Sequence[Mapping[str, Any]]


class _TooMuchWork(Exception):
    """The template has used up its budget."""


def render_chat(
    processor: Any, messages: Messages, *, chat_template: str | None = None, **kwargs: Any
) -> str:
    """The text of a conversation, as `processor.apply_chat_template` writes it.

    Args:
        processor: the model's.
        messages: as chat templates read them.
        chat_template: the template; None: the processor's own.
        **kwargs: for the template, e.g. `add_generation_prompt`.

    Raises:
        CheckpointError: the template is no Jinja, or its work has no bounds; names its file.
        DataError: the template refuses this conversation.
    """
    try:
        own = processor.chat_template
        text = (own.get("default") if isinstance(own, dict) else own) or ""
        _check_work(processor, chat_template or text, messages, kwargs)
        return processor.apply_chat_template(
            messages, tokenize=False, chat_template=chat_template, **kwargs
        )
    except _TooMuchWork as error:
        raise CheckpointError(
            f"{template_file(processor)}: the chat template loops, or builds a huge text, for a "
            f"conversation of {len(messages)} turns; copy the template from the model's publisher"
        ) from error
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"{template_file(processor)}: the chat template is not valid Jinja "
            f"({first_line(error)}, line {error.lineno}); copy it from the model's publisher"
        ) from error
    except Exception as error:  # the template's code may raise anything
        roles = ", ".join(str(message["role"]) for message in messages)
        reason = first_line(error)
        if not isinstance(error, TemplateError):
            reason = f"{type(error).__name__}, {reason}"
        raise DataError(
            f"the model's chat template rejects this: {reason} (turns: {roles})"
        ) from error


def template_file(processor: Any) -> str:
    """The file that the processor's chat template stands in, for messages."""
    folder = Path(str(getattr(processor.tokenizer, "name_or_path", "")))
    files = (folder / name for name in _FILES)
    return str(next((file for file in files if file.is_file()), "the model's processor"))


# ---------------------------------------------------------------------- the shape is checked once


def _check_work(
    processor: Any, template: str, messages: Messages, variables: dict[str, Any]
) -> None:
    """Raises _TooMuchWork when rendering these messages has no bounds."""
    tools = variables.get("tools") or []
    plain = sorted((key, value) for key, value in variables.items() if key != "tools")
    shape = (tuple(_shape(message) for message in messages), len(tools), *plain)
    checked = _checked_shapes(template)
    if shape in checked:
        return
    budget = _work_left.set(WORK + WORK_PER_CHARACTER * _weight([*messages, *tools], WORK))
    special = processor.tokenizer.special_tokens_map
    try:
        program = _compiled(template)
        _spend(0)
        known = {"messages": messages, "tools": None, "documents": None}
        program.render({**known, **special, **variables})
    except _TooMuchWork:
        raise
    except Exception:
        return  # transformers will say what is wrong
    finally:
        _work_left.reset(budget)
    if len(checked) < _SHAPES:
        checked.add(shape)


@functools.lru_cache(maxsize=64)
def _checked_shapes(template: str) -> set[Hashable]:
    """The shapes that `template` has rendered within its budget."""
    return set()


def _shape(message: Mapping[str, Any]) -> Hashable:
    content = message["content"]
    if isinstance(content, str):
        return (message["role"], content == "", *sorted(message))
    return (message["role"], tuple(part["type"] for part in content), *sorted(message))


# ---------------------------------------------------------------------- counting


_EXHAUSTED = -1
_work_left: ContextVar[int | None] = ContextVar("work_left", default=None)


def _spend(work: int) -> None:
    left = _work_left.get()
    if left is None:
        return
    if work > left:
        _refuse()
    _work_left.set(left - work)


def _refuse() -> NoReturn:
    _work_left.set(_EXHAUSTED)  # jinja2 ignores errors in constants
    raise _TooMuchWork


def _size(value: Any) -> int:
    """Items or characters of a value itself."""
    if isinstance(value, int):
        return value.bit_length() // 8
    return len(value) if isinstance(value, str | list | tuple | dict | range) else 0


def _weight(value: Any, limit: int) -> int:
    """Characters that a value would have as text, or more than `limit`."""
    total, pending = 0, [value]
    while pending and total <= limit:
        item = pending.pop()
        total += 4  # its separator and quotes
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            pending += item
        else:
            total += _size(item)
    return total


def _check_numbers(values: Iterable[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > _LARGEST_NUMBER for value in values):
        _refuse()


@jinja2.pass_context  # so that jinja2 does not compute it once, as a constant
def _each_counted(context: Any, items: Iterable[Any]) -> Iterator[Any]:
    """Filter around what a loop walks."""
    for item in items:
        _spend(STEP)
        yield item


@jinja2.pass_context
def _as_text(context: Any, value: Any) -> Any:
    """Filter around what is written or joined."""
    _spend_text(value)
    return value


def _spend_text(value: Any) -> None:
    left = _work_left.get()
    _spend(_weight(value, WORK if left is None else left))


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's whose work is counted."""
    writes = name in ("string", "tojson", "join", "pprint", "format", "urlencode", "xmlattr")
    first = int(hasattr(function, "jinja_pass_arg"))  # where the filtered value is

    @functools.wraps(function)  # with jinja2's marks of what to pass
    def counted(*args: Any, **kwargs: Any) -> Any:
        _spend(STEP)
        _check_numbers((*args, *kwargs.values()))
        if name == "join":
            separator = kwargs.get("d", args[first + 1] if len(args) > first + 1 else "")
            args = (*args[:first], _joined(separator, args[first]), *args[first + 1 :])
        _check_pieces(name, args[first], [*args[first + 1 :], *kwargs.values()])
        if writes:
            _spend_text(args)
        result = function(*args, **kwargs)
        _spend(_size(result))
        return result

    return counted


_PLACES: dict[str, Callable[[str, Any], int]] = {
    "replace": lambda text, given: text.count(str(given[0])),
    "format": lambda text, given: text.count("%") + text.count("{"),
    "format_map": lambda text, given: text.count("{"),
    "indent": lambda text, given: len(text.splitlines()),
    "expandtabs": lambda text, given: text.count("\t"),
    "translate": lambda text, given: len(text),
    "wordwrap": lambda text, given: len(text),
    "urlize": lambda text, given: len(text),
}
"""Methods and filters that write what they are given into many places of a text -> how many."""


def _check_pieces(name: str, text: Any, given: Sequence[Any]) -> None:
    """Raises _TooMuchWork before a text grows by the product of two sizes."""
    if name == "tojson" and given:
        _spend(_weight(text, WORK) * max(filter(_is_int, given), default=0))
    if name not in _PLACES or not isinstance(text, str) or not given:
        return
    if name in ("format", "format_map") and re.search(r"\d{7}", text):
        _refuse()
    widths = name in ("indent", "expandtabs")
    pieces = (v if widths and _is_int(v) else _weight(v, WORK) for v in given)
    _spend(_PLACES[name](text, given) * max(*pieces, 0))


def _joined(separator: Any, items: Iterable[Any]) -> list[Any]:
    """The items, whose text with separators is paid for."""
    walked = []
    for item in items:
        _spend(STEP + _size(separator))
        walked.append(item)
    _spend_text(walked)
    return walked


def _is_int(value: Any) -> bool:
    return isinstance(value, int)


def _tojson(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class _GenerationBlock(jinja2.ext.Extension):
    """The block with which transformers marks the tokens of answers."""

    tags = {"generation"}  # noqa: RUF012 (an attribute of instances there, too)

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _CountingEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
        )
        self.filters["tojson"] = _tojson
        self.filters.update({name: _counted(name, f) for name, f in self.filters.items()})
        self.filters |= {"_each_counted": _each_counted, "_as_text": _as_text}
        self.globals["raise_exception"] = _raise_exception
        self.globals["lipsum"] = lambda *_, **__: _refuse()  # as many words as it is asked for
        self.globals["strftime_now"] = lambda format: str(format)

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        _spend(CALL + sum(map(_size, args)))
        _check_numbers((*args, *kwargs.values()))
        method = getattr(called, "__wrapped__", called)  # the sandbox wraps `str.format`
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            if method.__name__ == "join" and args:
                args = (_joined(text, args[0]),)
            _check_pieces(method.__name__, text, [*args, *kwargs.values()])
        result = super().call(context, called, *args, **kwargs)
        _spend(_size(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        _spend(_size(result))
        return result


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Raises _TooMuchWork for an operation that would take all memory at once."""
    match operator, left, right:
        case ("*", int(times), str() | list() | tuple() as value) | (
            "*",
            str() | list() | tuple() as value,
            int(times),
        ):
            _spend(max(times, 0) * len(value))
        case ("**", int(), int()):
            _spend(left.bit_length() * max(right, 0) // 8)
        case ("%", str(), _):
            _check_numbers(right if isinstance(right, tuple) else (right,))
            _check_pieces("format", left, [right])


class _ConstantOperations(NodeTransformer):
    """Computes what jinja2 computes when it compiles, also where a program never gets to."""

    def _computed(self, node: Any) -> Any:
        node = self.generic_visit(node)
        try:
            left, right = node.left.as_const(), node.right.as_const()
            _check_operands(node.operator, left, right)
            value = ImmutableSandboxedEnvironment.default_binop_table[node.operator](left, right)
        except _TooMuchWork:
            raise
        except Exception:
            return node
        _spend_text(value)  # the compiler writes it out
        return jinja2.nodes.Const(value, lineno=node.lineno, environment=node.environment)

    visit_Add = visit_Mul = visit_Pow = visit_Mod = _computed


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    """The template with its loops and what it writes passed through the counting filters."""
    environment = _CountingEnvironment()
    tree = _ConstantOperations().visit(environment.parse(template))
    for loop in list(tree.find_all(jinja2.nodes.For)):
        loop.iter = _filtered(loop.iter, "_each_counted")
    for texts in list(tree.find_all((jinja2.nodes.Output, jinja2.nodes.Concat))):
        texts.nodes = [_filtered(node, "_as_text") for node in texts.nodes]
    code: Any = environment.compile(tree)
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))


def _filtered(node: jinja2.nodes.Expr, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
