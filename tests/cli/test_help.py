"""The command line stays quick and does not grow by accident."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import typer.main

from cafe.cli import app

HEAVY = ["torch", "transformers", "numpy", "pydantic", "PIL", "pyarrow", "rich", "yaml"]
# typer itself loads pydantic to explain the values of a verb's options.
OF_TYPER = {"pydantic"}

# Another option is a decision: does it belong into the recipe instead?
SURFACE = {
    "": ["--debug", "--version", "--install-completion", "--show-completion"],
    "demo": ["--out", "--steps", "--seed"],
    "train": ["RECIPE.yaml", "KEY=VALUE", "--resume", "--dry-run", "--json"],
    "plan": ["RECIPE.yaml", "KEY=VALUE", "--gpu", "--count", "--json"],
    "watch": ["RUN", "--measure", "--every", "--once"],
    "report": ["RUN...", "--to"],
    "evaluate": [
        "MODEL",
        "KEY=VALUE",
        "--task",
        "--suite",
        "--data",
        "--json",
        "--limit",
        "--judge",
        "--caption",
        "--think",
        "--force",
    ],
    "compare": ["RESULT..."],
    "ablate": ["[RECIPE.yaml] [KEY=VALUE]...", "--out", "--report", "--keep-models"],
    "embed": [
        "MODEL",
        "INPUT",
        "--out",
        "--to",
        "--shard-size",
        "--engine",
        "--workers",
        "--caption",
        "--think",
    ],
    "index": [
        "MODEL",
        "FOLDER_OR_DATA",
        "--to",
        "--caption",
        "--think",
        "--multi-vector",
        "--pool",
        "--page-pixels",
        "--max-pages",
        "--batch-size",
    ],
    "search": [
        "DIR",
        "[TEXT]",
        "--image",
        "--top",
        "--rerank",
        "--rerank-by",
        "--where",
        "--hybrid",
        "--caption",
        "--think",
        "--answer",
        "--model",
        "--json",
    ],
    "generate": ["MODEL", "PROMPT", "--image", "--max-new-tokens", "--temperature", "--best-of"],
    "think": ["MODEL", "DATA", "--out", "KEY=VALUE", "--max-new-tokens", "--batch-size"],
    "mine": [
        "MODEL",
        "DATA",
        "--out",
        "--range",
        "--margin",
        "--max-share",
        "--count",
        "--batches",
        "--image-root",
        "--batch-size",
    ],
    "convert": ["DIR", "--to"],
    "export": [
        "MODEL",
        "--to",
        "--merge",
        "--verify",
        "--cross-encoder",
        "--results",
        "--push",
        "--private",
        "--dry-run",
    ],
    "serve": [
        "MODEL",
        "--index",
        "--host",
        "--port",
        "--api-key",
        "--max-batch",
        "--max-wait-ms",
        "--max-queue",
        "--prefix-cache-mb",
        "--allow-remote-images",
        "--ui",
        "--access-log",
        "--log-level",
        "--config",
    ],
    "ui": ["MODEL", "--index", "--host", "--port", "--api-key"],
    "data": [],
    "data inspect": ["PATH", "KEY=VALUE", "--model", "--count", "--png"],
    "data scenes": ["--out", "--count", "--seed", "--split", "--negatives"],
    "doctor": ["[MODEL]"],
}


def surface(command: typer.main.TyperGroup, name: str = "") -> dict[str, list[str]]:
    names = [
        parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]
        for parameter in command.params
    ]
    found = {name: names}
    for child_name, child in getattr(command, "commands", {}).items():
        found |= surface(child, f"{name} {child_name}".strip())
    return found


def test_the_surface_is_the_agreed_one():
    assert surface(typer.main.get_command(app)) == SURFACE


def test_every_option_and_every_verb_is_explained():
    def walk(command) -> None:
        assert command.help
        first = command.help.splitlines()[0]
        assert command.name == "cafe" or len(first) <= 45, f"the list of verbs cuts {first!r}"
        assert all(parameter.help for parameter in command.params), command.name
        for child in getattr(command, "commands", {}).values():
            walk(child)

    walk(typer.main.get_command(app))


@pytest.mark.parametrize(
    "argv", [None, ["--help"], ["--version"], ["train", "--help"], ["embed", "--help"]]
)
def test_nothing_heavy_is_imported_before_a_verb_runs(argv):
    run = "" if argv is None else f"sys.argv[1:] = {argv}\ntry: main()\nexcept SystemExit: pass"
    code = f"import sys\nfrom cafe.cli import main\n{run}\nprint('loaded', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "cafe.cli" in loaded
    verb = argv is not None and len(argv) > 1
    assert loaded & set(HEAVY) <= (OF_TYPER if verb else set())


def test_version_is_that_of_the_distribution(command_line):
    assert command_line("--version") == (0, f"cafe-vlm {metadata.version('cafe-vlm')}\n", "")


@pytest.mark.slow
def test_the_page_of_the_command_line_is_the_generated_one(tmp_path):
    page = tmp_path / "cli.md"
    words = ["utils", "docs", "--name", "cafe", "--title", "Command line", "--output", str(page)]
    command = [sys.executable, "-m", "typer", "cafe.cli", *words]
    subprocess.run(command, check=True, env=os.environ | {"COLUMNS": "100"}, timeout=120)
    kept = Path(__file__).parents[2] / "docs" / "cli.md"
    assert page.read_text("utf-8") == kept.read_text("utf-8"), "run make cli-page"
