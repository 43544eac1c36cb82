"""A recipe file and its `key=value` overrides become one checked `Recipe`, or an `Ablation`.

Every mistake is one RecipeError that names the place (the file, or the override), the dotted key
(`optimizer.learning_rate`, `data.0.path`), and what to write instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cafe.errors import RecipeError
from cafe.recipes.ablation import Ablation
from cafe.recipes.tree import DataSource, Recipe
from cafe.recipes.yaml_text import parse_yaml

_SECTIONS = (
    "objective",
    "batch",
    "optimizer",
    "tuning",
    "schedule",
    "checkpoint",
    "log",
    "training",
)
_Tree = TypeVar("_Tree", Recipe, Ablation)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path` and apply `overrides` such as `optimizer.learning_rate=1e-4`.

    An override's value is a YAML scalar or list; `data.0.limit=100` reaches into a list. Data
    paths of the file are relative to its folder, those of overrides to the working directory.
    Raises RecipeError.
    """
    return _load(Path(path), overrides, Recipe, _anchor_data_paths)


def load_ablation(path: str | Path, overrides: Sequence[str] = ()) -> Ablation:
    """As `load_recipe`, for `cafe ablate`. `recipe`, if a file, is relative as data paths are."""
    return _load(Path(path), overrides, Ablation, _anchor_recipe)


def _load(
    path: Path,
    overrides: Sequence[str],
    kind: type[_Tree],
    anchor: Callable[[dict[str, Any], Path], None],
) -> _Tree:
    """The file and then the overrides, each with its paths made absolute by `anchor`."""
    tree = _read(path)
    anchor(tree, path.parent)
    for override in overrides:
        _apply(tree, override)
    anchor(tree, Path())
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _recipe_error(error, str(path), overrides, kind) from None


def load_source(path: str, overrides: Sequence[str] = ()) -> DataSource:
    """One data source, with `overrides` such as `mode=chat`, as `data.0` of a recipe has them.

    Paths are relative to the working directory. Raises RecipeError.
    """
    tree: dict[str, Any] = {"data": [{"path": path}], **_ANY_RUN}
    prefixed = [f"data.0.{override}" for override in overrides]
    for override in prefixed:
        _apply(tree, override)
    _anchor_data_paths(tree, Path())
    try:
        return Recipe.model_validate(tree).data[0]
    except ValidationError as error:
        raise _recipe_error(error, path, prefixed) from None


_ANY_RUN: dict[str, Any] = {
    "model": "tiny",
    "output_dir": "out",
    "batch": {"examples": 1},
    "optimizer": {"learning_rate": 1.0},
    "schedule": {"steps": 1},
}
"""What a recipe needs besides its data."""


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"{path}: cannot be read ({reason})") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML ({_one_line(error)})") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, e.g. model: tiny")
    # A section whose keys are all commented out reads as None and means its defaults.
    return {key: {} if value is None and key in _SECTIONS else value for key, value in tree.items()}


def _one_line(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"{error.problem}" + (f", line {mark.line + 1}" if mark is not None else "")


def _anchor_data_paths(tree: dict[str, Any], folder: Path) -> None:
    """Make relative data paths absolute, starting at `folder`. Leaves wrong types for the check."""
    sources = tree.get("data")
    for source in sources if isinstance(sources, list) else []:
        for key in ("path", "image_root"):
            value = source.get(key) if isinstance(source, dict) else None
            if isinstance(value, str) and value and not value.startswith("hub:"):
                source[key] = str((folder / Path(value).expanduser()).absolute())


def _anchor_recipe(tree: dict[str, Any], folder: Path) -> None:
    """A recipe that is a file, not a name, starts at `folder`."""
    name = tree.get("recipe")
    if isinstance(name, str) and Path(name).suffix in (".yaml", ".yml"):
        tree["recipe"] = str((folder / Path(name).expanduser()).absolute())


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"override {override!r}: expected key=value, e.g. batch.examples=64")
    node: Any = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise RecipeError(
                    f"override {override!r}: {'.'.join(parts[:depth])} has {len(node)} entries, "
                    f"expected a number below {len(node)} instead of {part!r}"
                )
            slot: Any = int(part)
        elif isinstance(node, dict):
            slot = part
        else:
            raise RecipeError(
                f"override {override!r}: {'.'.join(parts[:depth])} is a value and has no keys"
            )
        if last:
            node[slot] = _value(override, text)
        else:
            if isinstance(node, dict) and node.get(slot) is None:
                node[slot] = {}
            node = node[slot]


def _value(override: str, text: str) -> Any:
    """The YAML value of `text`. Plain text is taken as it stands, `#` and `: ` included."""
    text = text.strip()
    if text[:1] in {"[", "{", '"', "'"}:
        try:
            return parse_yaml(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"override {override!r}: {_one_line(error)}") from error
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, bool | int | float | None) else text


def _recipe_error(
    error: ValidationError,
    path: str,
    overrides: Sequence[str],
    kind: type[BaseModel] = Recipe,
) -> RecipeError:
    """The first problem, in one sentence; misspelt keys first, as they make others missing."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    key = ".".join(str(part) for part in problem["loc"])
    unknown = problem["type"] == "extra_forbidden"
    place = next((f"override {o!r}" for o in overrides if _concerns(o, key, unknown)), path)
    return RecipeError(f"{place}: {_describe(problem, key, kind)}")


def _concerns(override: str, key: str, unknown: bool) -> bool:
    """Whether `override` wrote the value at `key`, or made the unknown section `key`."""
    name = override.partition("=")[0].strip()
    within = key == name or key.startswith(f"{name}.")
    return bool(key) and (within or (unknown and name.startswith(f"{key}.")))


def _describe(problem: ErrorDetails, key: str, tree: type[BaseModel]) -> str:
    kind, message = problem["type"], problem["msg"]
    if kind == "extra_forbidden":
        nearest = _nearest(key, tree)
        return f"{key} is no key of a recipe" + (f"; did you mean {nearest}?" if nearest else "")
    if kind == "missing":
        return f"{key} is missing; it has no default"
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
        if not message.startswith("expected"):  # a sentence about a whole section
            return f"{key}: {message}" if key else message
    elif kind == "model_type" or kind == "model_attributes_type":
        message = "expected a mapping of keys to values"
    message = message.replace("Input should be", "expected", 1)
    return f"{key} is {problem['input']!r}, {message}"


def _nearest(key: str, tree: type[BaseModel]) -> str | None:
    """The valid key most like `key`: of the same section, else one of that name elsewhere."""
    *section, leaf = key.split(".")
    # The index of a list entry is no part of a key's name.
    schema_section = [part for part in section if not part.isdecimal()]
    siblings: dict[str, str] = {}
    others: dict[str, str] = {}
    for parts in _keys(tree):
        where = siblings if list(parts[:-1]) == schema_section else others
        where.setdefault(parts[-1], ".".join(parts))
    if close := difflib.get_close_matches(leaf, siblings, n=1):
        return ".".join([*section, close[0]])
    if close := difflib.get_close_matches(leaf, others, n=1, cutoff=0.8):
        return others[close[0]]
    return None


def _keys(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of the tree, as the parts of its dotted name."""
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        for section in _sections(field.annotation):
            yield from _keys(section, (*prefix, name))


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section classes that an annotation such as `list[DataSource]` names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in {list, Union, UnionType}:
        for argument in get_args(annotation):
            yield from _sections(argument)
