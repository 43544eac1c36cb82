"""One vision-language model that retrieves, reranks and answers.

    from cafe import CAFe

    model = CAFe.from_pretrained("tiny")
    model.encode(["a red mug"])

The names below are what most programs need. Each is imported when it is first used, so that the
command line starts quickly and what does not need torch does not wait for it. The packages inside
(`cafe.objective`, `cafe.metrics`, `cafe.training`, `cafe.evaluation`, …) say in their docstrings
what else they offer.
"""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cafe.errors import CafeError
    from cafe.evaluation.compare import compare
    from cafe.evaluation.run import evaluate
    from cafe.index import Index
    from cafe.memory import keep_memory
    from cafe.model.checkpoint.convert import convert
    from cafe.model.vlm import CAFe
    from cafe.planning.plan import plan
    from cafe.recipes import Recipe, load_recipe
    from cafe.release.cross_encoder import export_cross_encoder
    from cafe.release.push import push_to_hub
    from cafe.release.release import export, merge_adapter
    from cafe.release.verify import verify
    from cafe.retrieval.batch_mining import mine_batches
    from cafe.retrieval.embed import embed_dataset
    from cafe.retrieval.indexing import build_index
    from cafe.retrieval.mining import mine_hard_negatives
    from cafe.retrieval.search import Searcher
    from cafe.retrieval.thinking import write_thoughts
    from cafe.serving.run import serve
    from cafe.training.dry_run import dry_run
    from cafe.training.run import train
    from cafe.training.run_report import write_report
    from cafe.training.watching import run_status, watch
    from cafe.types import Audio, Example, Image, Message, Video, user

__all__ = [
    "Audio",
    "CAFe",
    "CafeError",
    "Example",
    "Image",
    "Index",
    "Message",
    "Recipe",
    "Searcher",
    "Video",
    "build_index",
    "compare",
    "convert",
    "dry_run",
    "embed_dataset",
    "evaluate",
    "export",
    "export_cross_encoder",
    "keep_memory",
    "load_recipe",
    "merge_adapter",
    "mine_batches",
    "mine_hard_negatives",
    "plan",
    "push_to_hub",
    "run_status",
    "serve",
    "train",
    "user",
    "verify",
    "watch",
    "write_report",
    "write_thoughts",
]

_HOMES = {
    "Audio": "cafe.types",
    "CAFe": "cafe.model.vlm",
    "CafeError": "cafe.errors",
    "Example": "cafe.types",
    "Image": "cafe.types",
    "Index": "cafe.index",
    "Message": "cafe.types",
    "Recipe": "cafe.recipes",
    "Searcher": "cafe.retrieval.search",
    "Video": "cafe.types",
    "build_index": "cafe.retrieval.indexing",
    "compare": "cafe.evaluation.compare",
    "convert": "cafe.model.checkpoint.convert",
    "dry_run": "cafe.training.dry_run",
    "embed_dataset": "cafe.retrieval.embed",
    "evaluate": "cafe.evaluation.run",
    "export": "cafe.release.release",
    "export_cross_encoder": "cafe.release.cross_encoder",
    "keep_memory": "cafe.memory",
    "load_recipe": "cafe.recipes",
    "merge_adapter": "cafe.release.release",
    "mine_batches": "cafe.retrieval.batch_mining",
    "mine_hard_negatives": "cafe.retrieval.mining",
    "plan": "cafe.planning.plan",
    "push_to_hub": "cafe.release.push",
    "run_status": "cafe.training.watching",
    "serve": "cafe.serving.run",
    "train": "cafe.training.run",
    "user": "cafe.types",
    "verify": "cafe.release.verify",
    "watch": "cafe.training.watching",
    "write_report": "cafe.training.run_report",
    "write_thoughts": "cafe.retrieval.thinking",
}

logging.getLogger("cafe").addHandler(logging.NullHandler())  # silent unless a program configures it


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("cafe-vlm")
    if name not in _HOMES:
        raise AttributeError(f"module 'cafe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
