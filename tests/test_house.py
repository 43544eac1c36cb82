"""The house rules as numbers."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import cafe
from cafe.data.scenes import questions
from cafe.model.rows import matching
from cafe.types import MATCH_QUESTION

SOURCE = Path(cafe.__file__).parent
MAX_FILE_LINES = 400
MIN_FILE_LINES = 60
MAX_FUNCTION_LINES = 70

FACES = {"__init__.py", "__main__.py"}
ONE_OF_A_KIND = ("cli/", "model/families/", "data/formats/", "evaluation/tasks/", "objective/")
"""Folders with one file per verb, model family, data format, task, or loss: any size is right."""
SMALL = {
    "evaluation/harness/lmms_eval_manifest.py": "an entry point, imported without torch",
}

PICTURES = {
    "types.py": ["Does the picture show"],
    "data/scenes/questions.py": ["in the picture?"],
    "data/scenes/language.py": ["the picture shows"],
    "model/rows/prompts.py": [
        *("seen.picture", "picture=false"),
        *("set pictures", "texts + pictures", "pictures + texts"),
    ],
    "metrics/hallucination.py": ['"pictures"'],
    "model/vlm.py": ["in the picture?"],
    "retrieval/search.py": ["in the picture?"],
    "retrieval/mining.py": ["The picture shows"],
}
"""The word is `image`. What stays: the first three are prompts and captions that models were
trained with, the fourth is the embedding template that saved models hold, the fifth is a column of
results that are on disk, and the others are examples that ask such a model."""


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


def named_types(tree: ast.Module) -> Iterator[str]:
    """Public classes and type aliases of a module. A constant is all in capitals."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            yield from (name for name in names if name[0].isupper() and not name.isupper())


def imports(tree: ast.Module) -> set[str]:
    """Modules that a module imports, early or late."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_rules_see_the_package_and_can_fail():
    assert len(list(modules())) >= 20
    long = ast.parse("def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES)
    assert list(long_functions(long)) == [("f", MAX_FUNCTION_LINES + 1)]
    assert prints(ast.parse("x = 1\nif x:\n    print(x)")) == [3]
    types = "class A: ...\nclass _B: ...\nPair = tuple[A, A]\nKind: TypeAlias = int\nMAX = 1\nx = 2"
    assert list(named_types(ast.parse(types))) == ["A", "Pair", "Kind"]
    late = "import a.b\ndef f():\n    from cafe import cli\n    from c.d import e"
    assert imports(ast.parse(late)) == {"a.b", "cafe", "cafe.cli", "c.d", "c.d.e"}


def test_no_file_is_too_long_to_read():
    too_long = {name: text.count("\n") for name, text, _ in modules()}
    assert {n: lines for n, lines in too_long.items() if lines > MAX_FILE_LINES} == {}


def test_no_file_is_too_small_to_be_worth_opening():
    too_small = {
        name: text.count("\n")
        for name, text, _ in modules()
        if text.count("\n") < MIN_FILE_LINES
        and Path(name).name not in FACES
        and not name.startswith(ONE_OF_A_KIND)
    }
    assert {n: lines for n, lines in too_small.items() if n not in SMALL} == {}
    assert set(SMALL) <= set(too_small), "an exception that is no longer needed"


def test_no_class_name_is_used_twice():
    homes: dict[str, list[str]] = {}
    for name, _, tree in modules():
        for defined in named_types(tree):
            homes.setdefault(defined, []).append(name)
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


def test_nothing_imports_the_command_line():
    found = {
        name
        for name, _, tree in modules()
        if name != "__main__.py" and not name.startswith("cli/")
        for module in imports(tree)
        if module == "cafe.cli" or module.startswith("cafe.cli.")
    }
    assert found == set()


def test_an_image_is_called_an_image():
    found, needed = [], set()
    for path in sorted(SOURCE.rglob("*")):
        name = path.relative_to(SOURCE).as_posix()
        if path.suffix in {"", ".pyc", ".png"} or name.startswith("model/tiny_base/"):
            continue  # the bundled model is as it was saved
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for phrase in PICTURES.get(name, ()):
                needed |= {(name, phrase)} if phrase in line else set()
                line = line.replace(phrase, "")
            if "picture" in line.lower():
                found.append(f"{name}:{number}")
    assert found == []
    listed = {(name, phrase) for name, phrases in PICTURES.items() for phrase in phrases}
    assert needed == listed, "an exception that is no longer needed"


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


def test_the_match_question_is_written_once():
    """`CAFe.score` asks what the bundled world trains; two texts could drift apart."""
    written = [
        name
        for name, _, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value == MATCH_QUESTION
    ]
    assert written == ["types.py"]
    trained = sys.modules[questions.__module__]
    assert vars(trained)["MATCH_QUESTION"] is MATCH_QUESTION
    assert vars(matching)["MATCH_QUESTION"] is MATCH_QUESTION
