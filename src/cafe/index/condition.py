"""`where`: a condition over the columns of an index, read by a small grammar and written anew.

LanceDB's SQL engine evaluates whatever expression it is given, and some of 40 characters end the
process (a stack overflow, an allocation of 96 GB). So it never sees what people wrote, only what
this module writes: comparisons of columns and literals, LIKE, IN, BETWEEN, IS NULL, and AND, OR and
NOT, bounded in length, depth and number.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from cafe.errors import CafeError, DataError

if TYPE_CHECKING:
    from lark import Lark, Tree

MAX_CHARACTERS = 20_000
MAX_TESTS = 100
"""Number of tests (comparisons and their like): the engine descends once for each."""

MAX_DEPTH = 20
"""Depth of parentheses and NOTs."""

_GRAMMAR = r"""
?start: or
or: and (_OR and)*
and: not (_AND not)*
?not: NOT not         -> negation
    | "(" or ")" -> group
    | test
?test: operand COMPARISON operand         -> comparison
     | operand NOT? LIKE operand          -> like
     | operand NOT? _IN "(" literal ("," literal)* ")"  -> among
     | operand NOT? _BETWEEN operand _AND operand     -> between
     | operand _IS NOT? CONSTANT            -> is
     | column                             -> truth
     | CONSTANT                           -> truth
?operand: column | literal
literal: NUMBER | TEXT | CONSTANT
column: NAME | QUOTED
_OR.2: /OR\b/i
_AND.2: /AND\b/i
_IN.2: /IN\b/i
_IS.2: /IS\b/i
_BETWEEN.2: /BETWEEN\b/i
NOT.2: /NOT\b/i
LIKE.2: /I?LIKE\b/i
CONSTANT.2: /(TRUE|FALSE|NULL)\b/i
COMPARISON: "=" | "==" | "!=" | "<>" | "<=" | ">=" | "<" | ">"
NUMBER: /[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?/i
TEXT: /'[^']*(''[^']*)*'/
QUOTED: /`[^`]+`/
NAME: /[^\W\d]\w*/
%ignore /\s+/
"""


def checked(where: str, columns: Iterable[str]) -> str:
    """`where` as SQL that the engine can evaluate safely.

    Args:
        where: "width > 640 AND (text LIKE '%cat%' OR kind IN ('image', 'both'))". Columns whose
            name is a word of the grammar stand in backticks.
        columns: names of the columns that may be used.

    Returns:
        The same condition, parenthesised.

    Raises:
        DataError: it is no such condition, names another column, or is too long, too deep or has
            too many tests.
        CafeError: lark, which reads it, is not installed.
    """
    names = list(columns)
    try:
        return _Writer(names).written(_parsed(where))
    except DataError as error:
        raise unusable(where, str(error), names) from error


def unusable(where: str, reason: str, columns: Iterable[str]) -> DataError:
    """The error for a condition that cannot be used."""
    return DataError(
        f"where {_cut(where)!r} cannot be used ({_cut(reason)}); "
        f"compare the columns {', '.join(columns)} with =, <, LIKE, IN, BETWEEN or IS NULL"
    )


def _cut(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}…"


def _parsed(where: str) -> Tree[Any]:
    parser = _parser()  # first: without lark nothing below can be imported
    from lark.exceptions import UnexpectedEOF, UnexpectedInput, UnexpectedToken

    if len(where) > MAX_CHARACTERS:
        raise DataError(f"{len(where):,} characters exceed the limit of {MAX_CHARACTERS:,}")
    if not where.strip():
        raise DataError("expected: an expression")
    try:
        return parser.parse(where)
    except UnexpectedEOF as error:
        raise DataError("error parsing statement: it ends too early") from error
    except UnexpectedToken as error:
        if error.token.type == "$END":
            raise DataError("error parsing statement: it ends too early") from error
        raise DataError(
            f"error parsing statement: unexpected {str(error.token)[:50]!r} at character "
            f"{error.column}"
        ) from error
    except UnexpectedInput as error:
        raise DataError(
            f"error parsing statement: unexpected sign at character {error.column}"
        ) from error


@functools.cache
def _parser() -> Lark:
    """LALR: neither its time nor its stack grows with the nesting of what it reads."""
    try:
        from lark import Lark
    except ImportError as error:
        raise CafeError(
            "a condition (where) needs lark, which is not installed; install it with "
            "pip install cafe-vlm[search]"
        ) from error
    return Lark(_GRAMMAR, parser="lalr")


class _Writer:
    """Writes a parsed condition as SQL."""

    def __init__(self, columns: list[str]) -> None:
        self._columns = columns
        self._tests = 0

    def written(self, node: Any, depth: int = 0) -> str:
        """SQL of a condition. Raises DataError beyond a limit or for an unknown column."""
        if depth > MAX_DEPTH:
            raise DataError(f"it is nested more than {MAX_DEPTH} deep")
        match node.data:
            case "or" | "and":
                parts = [self.written(part, depth) for part in node.children]
                return parts[0] if len(parts) == 1 else f"({f' {node.data.upper()} '.join(parts)})"
            case "group":
                return self.written(node.children[0], depth + 1)
            case "negation":
                return f"(NOT {self.written(node.children[1], depth + 1)})"
            case _:
                self._tests += 1
                if self._tests > MAX_TESTS:
                    raise DataError(f"it has more than {MAX_TESTS} comparisons")
                return f"({self._test(node)})"

    def _test(self, node: Any) -> str:
        parts = [self._part(part) for part in node.children]
        match node.data:
            case "among":
                values = next(i for i, part in enumerate(parts) if i and part != "NOT")
                return f"{' '.join(parts[:values])} IN ({', '.join(parts[values:])})"
            case "between":
                *operand, low, high = parts
                return f"{' '.join(operand)} BETWEEN {low} AND {high}"
            case "is":
                return " ".join([parts[0], "IS", *parts[1:]])
            case _:
                return " ".join(parts)

    def _part(self, part: Any) -> str:
        """SQL of a column, a literal or a word."""
        if not hasattr(part, "children"):
            return str(part).upper()
        (token,) = part.children
        if part.data == "column":
            return f"`{self._column(str(token).strip('`'))}`"
        return str(token)

    def _column(self, name: str) -> str:
        """The column of this name, in any case. Raises DataError when there is none."""
        same = [name] if name in self._columns else []
        same = same or [one for one in self._columns if one.lower() == name.lower()]
        if not same:
            raise DataError(f"no field named {name[:50]}")
        return same[0]
