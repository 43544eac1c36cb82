"""A recipe file and its `key=value` overrides become one checked `Recipe`.

Every mistake is one RecipeError that names the file or the override, the dotted key
(`optimizer.learning_rate`, `data.0.path`), and what to write instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cafe.errors import RecipeError
from cafe.recipes.base import Section, parse_yaml
from cafe.recipes.source import DataSource
from cafe.recipes.tree import Recipe

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
_Tree = TypeVar("_Tree", bound=Section)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path` and apply `overrides` such as `optimizer.learning_rate=1e-4`.

    An override's value is a YAML scalar or list; `data.0.limit=100` sets a key of a list entry.
    Data paths in the file are relative to its folder, those in overrides to the working directory.

        >>> recipe = load_recipe("caption.yaml", ["optimizer.learning_rate=1e-4"])
        >>> recipe.optimizer.learning_rate, recipe.batch.examples
        (0.0001, 256)

    Raises:
        RecipeError: the file cannot be read, or a key or value is not valid.
    """
    return load_tree(Path(path), overrides, Recipe, _anchor_data_paths)


def is_recipe(path: str | Path) -> bool:
    """Whether the file is a recipe, not data: LLaVA-NeXT's mixtures of data files are YAML, too."""
    if Path(path).suffix.lower() not in {".yaml", ".yml"} or not Path(path).is_file():
        return False
    try:
        return not {"model", "data"}.isdisjoint(_read(Path(path)))
    except RecipeError:
        return False  # reading it as data reports what is wrong


def load_tree(
    path: Path,
    overrides: Sequence[str],
    kind: type[_Tree],
    anchor: Callable[[dict[str, Any], Path], None],
) -> _Tree:
    """Read the file and apply the overrides; `anchor` makes the paths of each absolute.

    Raises:
        RecipeError: as `load_recipe`.
    """
    tree = _read(path)
    anchor(tree, path.parent)
    for override in overrides:
        _apply(tree, override)
    anchor(tree, Path())
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _recipe_error(error, str(path), overrides, kind) from None


def load_source(source: str | Mapping[str, Any], overrides: Sequence[str] = ()) -> DataSource:
    """One data source, with `overrides` such as `mode=chat`, which are keys of a recipe's `data.0`.

    `source` is its path or its keys. Paths are relative to the working directory.

    Raises:
        RecipeError: a key or value is not valid.
    """
    keys = {"path": source} if isinstance(source, str) else dict(source)
    tree: dict[str, Any] = {"data": [keys], **_ANY_RUN}
    prefixed = [f"data.0.{override}" for override in overrides]
    for override in prefixed:
        _apply(tree, override)
    if "thoughts" in tree["data"][0]:  # whether they are trained is not this source's affair
        tree["objective"] = {"thought_weight": 1.0}
    if "scores" in tree["data"][0]:
        tree.setdefault("objective", {})["soft_label_weight"] = 1.0
    _anchor_data_paths(tree, Path())
    try:
        return Recipe.model_validate(tree).data[0]
    except ValidationError as error:
        raise _recipe_error(error, str(keys.get("path", "data")), prefixed) from None


_ANY_RUN: dict[str, Any] = {
    "model": "tiny",
    "output_dir": "out",
    "batch": {"examples": 1},
    "optimizer": {"learning_rate": 1.0},
    "schedule": {"steps": 1},
}
"""The required keys of a recipe other than its data."""


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
    """Make data paths relative to `folder` absolute. Wrong types are left to validation."""
    sources, evaluate = tree.get("data"), tree.get("evaluate")
    held_out = evaluate.get("data") if isinstance(evaluate, dict) else None
    for source in [*(sources if isinstance(sources, list) else []), held_out]:
        for key in ("path", "image_root", "thoughts", "groups"):
            value = source.get(key) if isinstance(source, dict) else None
            if not isinstance(value, str) or not value or value.startswith("hub:"):
                continue
            if (key, value) != ("thoughts", "answers"):
                source[key] = str((folder / Path(value).expanduser()).absolute())
    tasks_data = evaluate.get("tasks_data") if isinstance(evaluate, dict) else None
    if isinstance(evaluate, dict) and isinstance(tasks_data, str):
        evaluate["tasks_data"] = str((folder / Path(tasks_data).expanduser()).absolute())


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
                f"override {override!r}: {'.'.join(parts[:depth])} is a value without keys"
            )
        if last:
            node[slot] = _value(override, text)
        else:
            if isinstance(node, dict) and node.get(slot) is None:
                node[slot] = {}
            node = node[slot]


def _value(override: str, text: str) -> Any:
    """The YAML value of `text`. Plain text is taken literally, including `#` and `: `."""
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
    """The first problem in one sentence; misspelled keys first, since they make others missing."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    key = ".".join(str(part) for part in problem["loc"])
    unknown = problem["type"] == "extra_forbidden"
    location = next((f"override {o!r}" for o in overrides if _concerns(o, key, unknown)), path)
    return RecipeError(f"{location}: {_describe(problem, key, kind)}")


def _concerns(override: str, key: str, unknown: bool) -> bool:
    """Whether `override` set the value at `key`, or created the unknown section `key`."""
    name = override.partition("=")[0].strip()
    within = key == name or key.startswith(f"{name}.")
    return bool(key) and (within or (unknown and name.startswith(f"{key}.")))


def _describe(problem: ErrorDetails, key: str, tree: type[BaseModel]) -> str:
    kind, message = problem["type"], problem["msg"]
    if kind == "extra_forbidden":
        nearest = _nearest(key, tree)
        return f"unknown recipe key {key}" + (f"; did you mean {nearest}?" if nearest else "")
    if kind == "missing":
        return f"{key} is missing and has no default"
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
        if not message.startswith("expected"):  # a sentence about a whole section
            return f"{key}: {message}" if key else message
    elif kind == "model_type" or kind == "model_attributes_type":
        message = "expected a mapping of keys to values"
    message = message.replace("Input should be", "expected", 1)
    return f"{key} is {problem['input']!r}, {message}"


def _nearest(key: str, tree: type[BaseModel]) -> str | None:
    """The valid key closest to `key`: in the same section, else one with its name in another."""
    *section, leaf = key.split(".")
    # The index of a list entry is not part of a key's name.
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
