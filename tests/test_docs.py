"""What the pages promise is there: verbs, options, keys of recipes, targets of make, modules."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

import cafe
from cafe.cli import app
from cafe.recipes import DataSource, Recipe, load_recipe

ROOT = Path(__file__).parent.parent
PACKAGE = Path(cafe.__file__).parent
SHIPPED = PACKAGE / "recipes"
DOCS = {
    path.name: path.read_text("utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))
}
HEADERS = {path.name: path.read_text("utf-8") for path in SHIPPED.glob("*.yaml")}
LAUNCHER = re.compile(r"^(?:torchrun|accelerate launch) .*?-m (?=cafe )")
COMMAND = re.compile(r"^(?:    |#   )?((?:cafe|torchrun|accelerate launch) .+)$", re.MULTILINE)
KEY = re.compile(r"`((?:batch|checkpoint|objective|optimizer|schedule|tuning)\.\w+)")
MINIMAL = {
    "model": "tiny",
    "output_dir": "out",
    "data": "[{path: captions.json}]",
    "batch": "{examples: 8}",
    "optimizer": "{learning_rate: 1e-3}",
    "schedule": "{steps: 1}",
}


def commands() -> list[str]:
    """The lines of all pages, and atop the recipes, that call cafe, without a launcher."""
    lines = [line for text in (DOCS | HEADERS).values() for line in COMMAND.findall(text)]
    lines = [LAUNCHER.sub("", line) for line in lines]
    calls = {line for line in lines if re.match(r"cafe [a-z]+", line)}
    return sorted({shlex.join(shlex.split(line, comments=True)) for line in calls})


def read(line: str) -> tuple[str, dict[str, Any]]:
    """A command line by the verb's own parser; nothing runs. Its name, and its parameters."""
    own = re.sub(r" --config \S+", "", line)  # the reader's own file; it names the model
    _, *words = shlex.split(own)
    command: Any = typer.main.get_command(app)
    name = ""
    while hasattr(command, "commands"):
        name, words = f"{name} {words[0]}".strip(), words[1:]
        command = command.commands[name.rpartition(" ")[2]]
    defaults = {"model": "tiny"} if own != line else None
    return name, command.make_context(name, words, default_map=defaults).params


def test_there_are_commands() -> None:
    verbs = {read(line)[0] for line in commands()}
    assert verbs >= {"train", "evaluate", "serve", "data inspect", "mine", "export", "convert"}


@pytest.mark.parametrize("line", commands())
def test_a_command_is_one(line: str, tmp_path: Path) -> None:
    verb, found = read(line)
    if verb == "train":
        recipe = SHIPPED / found["recipe"].name
        if not recipe.exists():
            recipe = tmp_path / "recipe.yaml"
            recipe.write_text("".join(f"{key}: {value}\n" for key, value in MINIMAL.items()))
        load_recipe(recipe, found["overrides"] or [])
    if verb == "data inspect":
        assert {pair.partition("=")[0] for pair in found["keys"] or []} <= {
            *DataSource.model_fields
        }


@pytest.mark.parametrize("word", ["--resum", "inspct", "tran"])
def test_a_wrong_command_is_seen(word: str) -> None:
    line = {"--resum": "train a.yaml --resum", "inspct": "data inspct a", "tran": "tran a.yaml"}
    with pytest.raises(Exception, match=word):
        read(f"cafe {line[word]}")


@pytest.mark.parametrize(
    "block", re.findall(r"```yaml\n(.*?)```", "".join(DOCS.values()), re.DOTALL)
)
def test_a_piece_of_a_recipe_is_valid(block: str, tmp_path: Path) -> None:
    rest = {key: value for key, value in MINIMAL.items() if not re.search(f"^{key}:", block, re.M)}
    (tmp_path / "r.yaml").write_text(block + "".join(f"{k}: {v}\n" for k, v in rest.items()))
    load_recipe(tmp_path / "r.yaml")


def test_every_key_that_a_page_names_is_one() -> None:
    found = {key for text in DOCS.values() for key in KEY.findall(text)}
    assert "batch.chunk" in found
    for key in found:
        section, name = key.split(".")
        assert name in Recipe.model_fields[section].annotation.model_fields, key  # type: ignore[union-attr]


def test_every_link_and_target_of_make_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for page, text in DOCS.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
        assert [link for link in links if not (folder / link).exists()] == [], page
        assert set(re.findall(r"`?\bmake ([a-z-]+)`", text)) <= targets, page


def test_every_module_that_a_page_names_is_there() -> None:
    for page, text in DOCS.items():
        for name in set(re.findall(r"`(cafe(?:\.\w+)+)", text)):
            path = PACKAGE.joinpath(*name.split(".")[1:])
            owner = path.parent.with_suffix(".py")
            inside = owner.exists() and path.name in owner.read_text("utf-8")
            there = path.is_dir() or path.with_suffix(".py").exists() or inside
            assert there or path.name in cafe.__all__, f"{page}: {name}"


def test_every_file_that_a_page_names_is_there() -> None:
    """A path starts anywhere; what the architecture lists is checked in full below."""
    folders = (PACKAGE, ROOT / "tests", ROOT / "benchmarks", ROOT / "scripts")
    there = [f"/{path.relative_to(ROOT)}" for one in folders for path in one.rglob("*.py")]
    found = 0
    for page, text in DOCS.items():
        for name in set(re.findall(r"(?<=[` ])[\w-]+/[\w/-]+\.py\b", text)):
            known = name.endswith("/NAME.py") or any(path.endswith(f"/{name}") for path in there)
            assert known, f"{page}: {name}"
            found += 1
    assert found > 40


def files_of_architecture(text: str) -> set[str]:
    """The files and folders that the lists of packages and files name, below src/cafe."""
    named: set[str] = set()
    packages = text.partition("    src/cafe/\n")[2].partition("\n\n")[0]
    owner = ""
    for line in packages.splitlines():
        names = re.findall(r"(?<![\w./])\w+(?:\.py|/)", line)
        if first := re.match(r" {6}(\w+/)", line):
            owner, names = first[1], names[1:]
            named.add(owner)
        elif re.match(r" {6}\w", line):
            owner = ""
        named |= {owner + name for name in names}
    for folder, table in re.findall(r"^\| `(\w+/)` \| \|\n((?:\|.*\n)+)", text, re.MULTILINE):
        for row in table.splitlines():
            inside = folder
            for name in re.findall(r"`((?:\w+/)*(?:\w+\.py)?)`", row):
                named.add(inside + name)
                if row.startswith(f"| `{name}` |") and name.endswith("/"):
                    inside += name  # the rest of the row says what is in it
    return named


def test_every_file_that_the_architecture_lists_is_there() -> None:
    named = files_of_architecture(DOCS["architecture.md"])
    expected = {"types.py", "media.py", "data/tables/", "model/vlm.py", "evaluation/mmeb/"}
    assert named >= expected | {"model/rows/trie.py", "model/checkpoint/locate.py"}
    assert [name for name in sorted(named) if not (PACKAGE / name).exists()] == []
    packages = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
    assert packages | modules <= named, "a package or module without a line"


def test_the_python_page_shows_every_public_name_and_verb() -> None:
    page = DOCS["python.md"]
    _imports, *examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    used = "".join(examples)
    assert [name for name in cafe.__all__ if not re.search(rf"\b{name}\b", used)] == []
    command: Any = typer.main.get_command(app)
    assert [verb for verb in command.commands if f"`cafe {verb}" not in page] == []
