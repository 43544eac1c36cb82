"""`cafe doctor`: is this installation sound, and what does a model read its embeddings from?"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated

import typer

from cafe.errors import CafeError

OPTIONAL = ("sentence-transformers",)


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table. `mend` says what to do; None when all is well."""

    name: str
    value: str
    mend: str | None = None


def command(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Also show this model's prompt and pooled token."),
    ] = None,
) -> None:
    """Check the installation.

    Versions, devices and the torchvision pair; with MODEL, its prompt and pooled token too.
    The exit code is 1 when something is broken.
    """
    reinstall = "reinstall torch and torchvision"
    checks = [
        *versions(),
        *_guarded("device", devices, reinstall),
        *_guarded("torchvision pair", pair, reinstall),
    ]
    if model is not None:
        checks += _guarded("model", lambda: contract(model), "name another model")
    width = max(len(check.name) for check in checks)
    for check in checks:
        state = "ok    " if check.mend is None else "BROKEN"
        print(f"{state}  {check.name:<{width}}  {check.value}")
    broken = [check for check in checks if check.mend is not None]
    for check in broken:
        print(f"\n{check.name}: {check.mend}")
    if broken:
        raise typer.Exit(1)


def _guarded(name: str, checks: Callable[[], Iterator[Check]], mend: str) -> list[Check]:
    """The checks; one that cannot even run is a broken one."""
    try:
        return list(checks())
    except CafeError as error:
        return [Check(name, "fails", mend=str(error))]
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "no message"
        return [Check(name, "fails", mend=f"{type(error).__name__}: {reason}; {mend}")]


def versions() -> Iterator[Check]:
    """Python and every requirement of this package, against the versions it asks for."""
    from packaging.requirements import Requirement

    yield Check("cafe-vlm", metadata.version("cafe-vlm"))
    yield Check("python", platform.python_version())
    for line in metadata.requires("cafe-vlm") or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _version(requirement.name, str(requirement.specifier), line.partition(";")[0])
    for name in OPTIONAL:
        installed = _installed(name)
        yield Check(name, installed or "not installed (optional)")


def _version(name: str, wanted: str, requirement: str) -> Check:
    from packaging.specifiers import SpecifierSet

    installed = _installed(name)
    mend = f"pip install '{requirement.strip()}'"
    if installed is None:
        return Check(name, "not installed", mend)
    if not SpecifierSet(wanted).contains(installed, prereleases=True):
        return Check(name, f"{installed}, but cafe needs {wanted}", mend)
    return Check(name, installed)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices() -> Iterator[Check]:
    """Where models run, and whether bfloat16 works there."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    yield Check("device cpu", f"{os.cpu_count()} cores, {capability}, {_bf16('cpu')}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gibibytes = properties.total_memory / 2**30
        yield Check(
            f"device cuda:{index}",
            f"{properties.name}, {gibibytes:.0f} GiB, {_bf16(f'cuda:{index}')}",
        )
    if torch.backends.mps.is_available():
        yield Check("device mps", _bf16("mps"))


def _bf16(device: str) -> str:
    """Tried rather than asked: what a device claims depends on driver and build."""
    import torch

    try:
        one = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
        works = bool((one @ one == 8).all())
    except RuntimeError:
        works = False
    return "bf16 works" if works else "no bf16: set precision=fp32"


def pair() -> Iterator[Check]:
    """The torchvision beside this torch: imported and tried, not only present."""
    from cafe.model.torchvision_pair import MEND, ensure_torchvision, operators_declared

    ensure_torchvision()
    import torch
    from torchvision.transforms.v2 import functional

    shape = tuple(functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape)
    if shape != (3, 4, 4):
        yield Check("torchvision pair", f"resizes to {shape}", MEND)
        return
    note = " (its compiled operators do not load; cafe does not need them)"
    yield Check("torchvision pair", "works" + (note if operators_declared() else ""))


def contract(model: str) -> Iterator[Check]:
    """What an embedding of `model` is read from."""
    from cafe.model.vlm import CAFe

    for name, value in CAFe.from_pretrained(model).embedding_contract().items():
        yield Check(name, repr(value) if "\n" in value else value)
