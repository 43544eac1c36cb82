"""What a shell offers for the values of arguments (`cafe --install-completion`).

A shell waits for it at every press of a key, so nothing here imports what a verb needs: the names
of tasks are written down, and a test compares them with the registry.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

TASK_NAMES = (
    "retrieval",
    "caption",
    "presence",
    "gap",
    "scenes-retrieval",
    "scenes-captions",
    "scenes-thoughts",
    "scenes-tokens",
    "scenes-match",
    "scenes-likelihood",
    "scenes-mmeb",
    "scenes-pope",
    "scenes-pope-all",
    "scenes-chair",
    "scenes-throne",
    "coco-5k",
    "flickr-1k",
    "coco-gap",
    "pope",
    "chair",
    "throne",
    "mmeb",
    "mmeb-video",
    "mmeb-visdoc",
    "captioning",
    "vqa",
)
"""As in `cafe.evaluation.registry.TASKS`, in its order."""


def tasks(incomplete: str) -> list[str]:
    """The tasks of `cafe evaluate --task`."""
    return [name for name in TASK_NAMES if name.startswith(incomplete)]


def models(incomplete: str) -> list[str]:
    """The bundled model, and folders."""
    bundled = ["tiny"] if "tiny".startswith(incomplete) else []
    return bundled + [f"{path}/" for path in _beginning(incomplete) if path.is_dir()]


def recipes(incomplete: str) -> list[str]:
    """YAML files, folders, and the recipes that ship with cafe."""
    paths = _beginning(incomplete)
    files = [str(path) for path in paths if path.suffix in {".yaml", ".yml"}]
    folders = [f"{path}/" for path in paths if path.is_dir()]
    shipped = [n for n in shipped_recipes() if n.startswith(incomplete) and n not in files]
    return files + folders + shipped


def shipped_recipes() -> list[str]:
    """Names of the recipe files in the package `cafe.recipes`, which is not imported for it."""
    spec = find_spec("cafe.recipes")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return sorted(path.name for folder in folders for path in Path(folder).glob("*.yaml"))


def _beginning(incomplete: str) -> list[Path]:
    """Files and folders whose path begins so, without hidden ones."""
    folder, _, name = incomplete.rpartition("/")
    parent = Path(f"{folder}/" if folder or incomplete.startswith("/") else ".")
    try:
        found = sorted(parent.iterdir())
    except OSError:
        return []
    return [p for p in found if p.name.startswith(name) and not p.name.startswith(".")]
