"""One vision-language model that retrieves, reranks and answers.

    from cafe import CAFe

    model = CAFe.from_pretrained("tiny")
    model.encode(["a red mug"])

The names below are what most programs need. Each is imported when it is first used, so that the
command line starts at once and what needs no torch does not wait for it. The packages inside
(`cafe.objective`, `cafe.metrics`, `cafe.train`, `cafe.evaluate`, …) say in their docstrings what
else they offer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cafe.errors import CafeError
    from cafe.index import Index
    from cafe.memory import keep_memory
    from cafe.model.vlm import CAFe
    from cafe.recipes import Recipe, load_recipe
    from cafe.types import Example, Image, Message, Video, user

__all__ = [
    "CAFe",
    "CafeError",
    "Example",
    "Image",
    "Index",
    "Message",
    "Recipe",
    "Video",
    "keep_memory",
    "load_recipe",
    "user",
]

_HOMES = {
    "CAFe": "cafe.model.vlm",
    "CafeError": "cafe.errors",
    "Example": "cafe.types",
    "Image": "cafe.types",
    "Index": "cafe.index",
    "Message": "cafe.types",
    "Recipe": "cafe.recipes",
    "Video": "cafe.types",
    "keep_memory": "cafe.memory",
    "load_recipe": "cafe.recipes",
    "user": "cafe.types",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cafe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
