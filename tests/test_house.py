"""The house rules as numbers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import cafe

SOURCE = Path(cafe.__file__).parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70


def modules() -> Iterator[tuple[str, str, ast.Module]]:
    """(path inside the package, text, syntax tree) of every module."""
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        yield path.relative_to(SOURCE).as_posix(), text, ast.parse(text)


def long_functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.name, lines


def prints(tree: ast.Module) -> list[int]:
    """Lines that call print."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


def test_the_rules_see_the_package_and_can_fail():
    assert len(list(modules())) >= 20
    long = ast.parse("def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES)
    assert list(long_functions(long)) == [("f", MAX_FUNCTION_LINES + 1)]
    assert prints(ast.parse("x = 1\nif x:\n    print(x)")) == [3]


def test_no_file_is_too_long_to_read():
    too_long = {name: text.count("\n") for name, text, _ in modules()}
    assert {n: lines for n, lines in too_long.items() if lines > MAX_FILE_LINES} == {}


def test_no_function_is_too_long_to_see():
    found = {(name, *function) for name, _, tree in modules() for function in long_functions(tree)}
    assert found == set()


def test_only_the_command_line_prints():
    found = {
        (name, line)
        for name, _, tree in modules()
        if not name.startswith("cli/")
        for line in prints(tree)
    }
    assert found == set()


def test_every_module_says_what_it_is_for():
    assert [name for name, text, tree in modules() if text and not ast.get_docstring(tree)] == []
