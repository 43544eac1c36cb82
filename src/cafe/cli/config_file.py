"""A YAML file with the options of a verb: `--config serve.yaml`. The command line wins over it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer

from cafe.errors import CafeError, first_line


def _take(context: typer.Context, path: str | None) -> str | None:
    """Make the file's values the defaults of the verb's options."""
    if path is not None:
        options = {p.name: p for p in context.command.params if p.name not in {"help", "config"}}
        context.default_map = _checked(context, path, options)
    return path


ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        is_eager=True,
        callback=_take,
        help="YAML with any of these options, e.g. port: 8080; the command line wins over it.",
    ),
]


def _checked(context: typer.Context, path: str, options: dict[Any, Any]) -> dict[str, Any]:
    """The values of a file. Raises CafeError naming the file, the key and what is possible."""
    import yaml

    from cafe.recipes.base import parse_yaml

    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CafeError(f"{path}: cannot be read ({reason})") from error
    except yaml.YAMLError as error:
        raise CafeError(f"{path}: not valid YAML ({first_line(error)})") from error
    if not isinstance(values, dict):
        raise CafeError(f"{path}: give options and their values, e.g. port: 8080")
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in options:
            close = difflib.get_close_matches(name, list(options), n=1)
            hint = f"did you mean {close[0]}?" if close else f"use {', '.join(options)}"
            raise CafeError(f"{path}: unknown key {key}; {hint}")
        if value is None:
            continue
        boolean = getattr(options[name], "is_flag", False)
        if isinstance(value, list | dict) or isinstance(value, bool) is not boolean:
            expected = "true or false" if boolean else "one value"
            raise CafeError(f"{path}: {key} is {value!r}, expected {expected}")
        try:
            options[name].process_value(context, value)
        except typer.BadParameter as error:
            raise CafeError(f"{path}: {key} is {value!r}: {error.message}") from error
        found[name] = value
    return found
