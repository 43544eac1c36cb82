"""What recipes of all kinds share: the types of their keys, strict sections, and YAML.

In the YAML of a recipe `1e-3` is a number, and a key that is written twice is an error: PyYAML
follows YAML 1.1, where `1e-3` (no dot) is a string, and keeps the last of two equal keys.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from cafe.files import replacing, writing

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]
ModelPart = Literal["vision", "projector", "language"]
UserPath = Annotated[Path, Strict(False), AfterValidator(Path.expanduser)]


def share_of(things: str, example: float, *, optional: bool = False) -> BeforeValidator:
    """One message for `float | int`, where pydantic would report two; `optional`: or None."""

    def check(value: object) -> object:
        if optional and value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"expected a fraction of all {things} ({example}) or a number of {things} (100)"
            )
        if value < 0 or (isinstance(value, float) and value >= 1):
            raise ValueError(f"expected a fraction of all {things} below 1.0, or a whole number")
        return value

    return BeforeValidator(check)


def check_distinct(values: list[Any]) -> list[Any]:
    if len({*values}) < len(values):
        raise ValueError("expected each value once")
    return values


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not coerced."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


# ---------------------------------------------------------------------- YAML

_FLOAT = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+\Z")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.value in seen and isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is written twice", key_node.start_mark
                )
            seen.add(key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Knows what the loader reads as a number, so that it quotes the string `1e-3`."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of the YAML `text`. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader


def to_yaml(tree: dict[str, Any]) -> str:
    """`tree` as YAML, keys in order; `parse_yaml` returns it unchanged."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def save_yaml(text: str, path: Path) -> None:
    """Write YAML to `path` at once.

    Raises:
        DataError: it cannot be written; an earlier file is unchanged.
    """
    with replacing(path) as unfinished, writing(path):
        unfinished.write_text(text, encoding="utf-8")
