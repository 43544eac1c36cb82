"""What is wrong with a request's body, in one sentence: pydantic's own are about its types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import Response

from cafe.errors import quoted
from cafe.serving.errors import ApiError

UNION_MEMBERS = {"str", "int", "Content", "ImageURL", "ToolCalled", "NamedTool"}
"""Names that pydantic adds to the location of an error, besides the names of fields."""

KINDS = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
}
"""Errors of a value of another kind than the field's, and the field's kind."""

OF_A_FIELD = {"unsupported_field", "missing_field"}
"""Errors of `cafe.serving.schema`: pydantic locates them at the object, their context has the
field."""

BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
}


async def invalid_body(request: Request, error: Exception) -> Response:
    """An invalid body, reported as OpenAI does (400, not 422)."""
    assert isinstance(error, RequestValidationError)
    return as_api_error(error.errors()).response


def as_api_error(problems: Sequence[Any]) -> ApiError:
    """One error for all that pydantic found.

    Each member of a union reports its own problem. A field of which we say ourselves what is wrong
    comes first. Else the one with the deepest location matched most of the value; of equally deep
    ones, one that is not about the value's kind.
    """
    problems = [_at_its_field(each) for each in problems]
    found = max(
        problems,
        key=lambda each: (
            each["type"] in OF_A_FIELD,
            len(each["loc"]),
            each["type"] not in KINDS,
        ),
    )
    if found["type"] == "json_invalid":
        return ApiError.invalid(f"the body is not valid JSON: {found['ctx']['error']}")
    param = _param(found["loc"])
    if found["type"] in KINDS:
        same = [each for each in problems if _param(each["loc"]) == param]
        kinds = list(dict.fromkeys(KINDS[each["type"]] for each in same if each["type"] in KINDS))
        message = f"must be {_any_of(kinds)}"
    else:
        message = _message(found)
    if param is None and message.startswith("must"):
        message = f"the body {message}"
    return ApiError.invalid(f"{param}: {message}" if param else message, param)


def _at_its_field(problem: Any) -> Any:
    if problem["type"] not in OF_A_FIELD:
        return problem
    return problem | {"loc": (*problem["loc"], problem["ctx"]["field"])}


def _message(problem: Any) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in BOUNDS:
        key, relation = BOUNDS[kind]
        return f"must be {relation} {_number(context[key])}"
    if kind in {"too_long", "too_short"}:
        limit = context["max_length" if kind == "too_long" else "min_length"]
        what = "character" if isinstance(problem["input"], str) else "item"
        if kind == "too_short" and limit == 1:
            return f"needs at least one {what}"
        few = "at most" if kind == "too_long" else "at least"
        return f"{few} {limit:,} {what}s are allowed, not {len(problem['input']):,}"
    if kind == "unsupported_field":
        neutral = context["neutral"]
        return f"not supported here; {f'only {_any_of(neutral)} is' if neutral else 'leave it out'}"
    if kind == "missing_field":
        return "the field is missing"
    if kind == "missing":
        return "the field is missing" if len(problem["loc"]) > 1 else "the body is empty"
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind == "union_tag_invalid":
        tags = _any_of(context["expected_tags"].split(", "))
        return f"{context['discriminator']} must be {tags}, not {quoted(context['tag'], 60)}"
    if kind == "union_tag_not_found":
        return f"{context['discriminator']} is missing"
    return problem["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _any_of(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def _param(location: tuple[int | str, ...]) -> str | None:
    """For example "messages.0.content", without pydantic's names for the members of a union."""
    names: list[str] = []
    for part in map(str, location[1:]):
        plain = part.isdecimal() or part.isidentifier()
        if plain and part not in UNION_MEMBERS and part not in names[-1:]:
            names.append(part)
    return ".".join(names)[:200] or None
