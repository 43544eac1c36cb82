"""Complete runs in YAML: the typed tree, and how a file becomes one.

Pure data: nothing here imports torch, and nothing here knows who runs a recipe.
"""

from cafe.recipes.ablation import Ablation, load_ablation
from cafe.recipes.load import is_recipe, load_recipe, load_source
from cafe.recipes.optimization import Optimizer, Schedule, Tuning
from cafe.recipes.running import Checkpoint, Evaluate, Log
from cafe.recipes.source import DataSource
from cafe.recipes.tree import Batch, Objective, Recipe

__all__ = [
    "Ablation",
    "Batch",
    "Checkpoint",
    "DataSource",
    "Evaluate",
    "Log",
    "Objective",
    "Optimizer",
    "Recipe",
    "Schedule",
    "Tuning",
    "is_recipe",
    "load_ablation",
    "load_recipe",
    "load_source",
]
