"""`cafe doctor`: check the installation, and show where a model's embeddings come from."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Also show this model's prompt and pooled token."),
    ] = None,
) -> None:
    """Check the installation.

    Versions, devices, the precision of training, the torchvision pair; with MODEL, its prompt and
    pooled token too. The exit code is 1 when something is broken.
    """
    from cafe.release.installation import check_installation

    checks = check_installation(model)
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.state:<6}  {check.name:<{width}}  {check.value}")
    faults = [check for check in checks if check.fix is not None]
    for check in faults:
        print(f"\n{check.name}: {check.fix}")
    if any(check.broken for check in faults):
        raise typer.Exit(1)
