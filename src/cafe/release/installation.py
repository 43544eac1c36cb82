"""What `cafe doctor` checks: the installation, and where a model's embeddings come from."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

from cafe.errors import CafeError

OPTIONAL = ("sentence-transformers",)


@dataclass(frozen=True, slots=True)
class Check:
    """One checked fact.

    name     of what was checked
    value    what was found
    fix      what to do; None when all is well
    broken   False: cafe works all the same, other tools may not
    """

    name: str
    value: str
    fix: str | None = None
    broken: bool = True

    @property
    def state(self) -> str:
        if self.fix is None:
            return "ok"
        return "BROKEN" if self.broken else "WARN"


def check_installation(model: str | None = None) -> list[Check]:
    """Check versions, devices, the precision of training and the torchvision pair.

    Args:
        model: Also loads this model and states where its embeddings are read.

    Returns:
        One check for each fact; what cannot be checked counts as broken, and nothing is raised.

    Example:
        >>> [check.value for check in check_installation("tiny") if check.name == "dimension"]
        ['256']
    """
    reinstall = "reinstall torch and torchvision"
    checks = [
        *versions(),
        *_guarded("device", devices, reinstall),
        *_guarded("torchvision pair", pair, reinstall),
    ]
    if model is not None:
        checks += _guarded("model", lambda: contract(model), "name another model")
    return checks


def _guarded(name: str, checks: Callable[[], Iterator[Check]], fix: str) -> list[Check]:
    """The checks; one that cannot run counts as broken."""
    try:
        return list(checks())
    except CafeError as error:
        return [Check(name, "fails", fix=str(error))]
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "no message"
        return [Check(name, "fails", fix=f"{type(error).__name__}: {reason}; {fix}")]


def versions() -> Iterator[Check]:
    """Python and every requirement of this package, compared with the required versions."""
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
    fix = f"pip install '{requirement.strip()}'"
    if installed is None:
        return Check(name, "not installed", fix)
    if not SpecifierSet(wanted).contains(installed, prereleases=True):
        return Check(name, f"{installed}, but cafe needs {wanted}", fix)
    return Check(name, installed)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices() -> Iterator[Check]:
    """Where models run, and the precision that `precision: auto` trains in there."""
    import torch

    from cafe.precision import SLOWER, described

    training = _training("cpu")
    emulated = "" if "bf16" in training else f"; bf16 would be emulated, {SLOWER}"
    yield Check("device cpu", f"{os.cpu_count()} cores, {described()}: {training}{emulated}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gibibytes = properties.total_memory / 2**30
        yield Check(
            f"device cuda:{index}",
            f"{properties.name}, {gibibytes:.0f} GiB: {_training(f'cuda:{index}')}",
        )
    if torch.backends.mps.is_available():
        yield Check("device mps", _training("mps"))


def _training(device: str) -> str:
    """Tested, too: whether a GPU computes at all depends on driver and build.

    Raises:
        RuntimeError: The device cannot multiply matrices.
    """
    import torch

    from cafe.precision import resolved_precision

    precision = resolved_precision("auto", device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one = torch.ones(8, 8, dtype=dtype, device=device)
    if not (one @ one == 8).all():
        raise RuntimeError(f"{device}: a matrix product in {precision} is wrong")
    return f"training in {precision}"


def pair() -> Iterator[Check]:
    """The torchvision next to this torch: imported and tested, not only present."""
    from cafe.model.torchvision_pair import FIX, ensure_torchvision, mismatch, operators_declared

    ensure_torchvision()
    import torch
    import torchvision
    from torchvision.transforms.v2 import functional

    shape = tuple(functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape)
    if shape != (3, 4, 4):
        yield Check("torchvision pair", f"resizes to {shape}", FIX)
        return
    effect = (
        "plain transformers cannot import it; cafe can"
        if operators_declared()
        else "its operators do not run on a GPU; cafe does not need them"
    )
    package = _installed("torch") or torch.__version__
    found = mismatch(torch.__version__, torchvision.__version__, package)
    if found is not None:
        yield Check("torchvision pair", f"{found.what}: {effect}", found.fix, broken=False)
    elif operators_declared():
        yield Check("torchvision pair", f"no compiled operators: {effect}", FIX, broken=False)
    else:
        yield Check("torchvision pair", "works")


def contract(model: str) -> Iterator[Check]:
    """The prompt and token that an embedding of `model` is read from."""
    from cafe.model.vlm import CAFe

    for name, value in CAFe.from_pretrained(model).embedding_contract().items():
        yield Check(name, repr(value) if "\n" in value else value)
