"""Does the model choose more faithful descriptions of its own? CHAIR of `best_of` against greedy.

    python benchmarks/best_of.py MODEL [--scenes 500] [--best-of 8] [--temperature T] [--seed 0]

The held-out scenes of `cafe evaluate`, and beyond these 500 others drawn alike, are described
greedily, by one sample, and by `generate(best_of=…)`, which chooses among the greedy description
and samples.
CHAIR counts the mentions of things that are not there (i), or the descriptions with one (s). It
does not see things left out, and a thing named twice counts as two right mentions. So beside it:

    recall       different things named and there, of those there
    unfounded    mentions without a thing of their own, of all: not there, or named more often
                 than it is there
    all_right    descriptions that name what is there, each as often as it is there, and no more

Intervals are bootstrap ones over pictures, 95 %; the differences are paired. Last line:
`chair_change: X [low, high]`, CHAIR-i of best_of minus that of greedy: better below 0.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cafe.data.scenes import PROMPT_CAPTION
from cafe.evaluate.caption import MAX_NEW_TOKENS
from cafe.evaluate.chair import Shown, chair_result
from cafe.evaluate.scene_set import HELD_OUT_COUNT, HELD_OUT_SEED, SceneItem, scene_items
from cafe.evaluate.scenes_words import SCENE_WORDS
from cafe.evaluate.scoring import Ratio, score_samples
from cafe.evaluate.task import Result
from cafe.memory import keep_memory
from cafe.metrics import Interval, percentile_interval
from cafe.model.best_of import SAMPLING_TEMPERATURE
from cafe.model.vlm import CAFe
from cafe.types import user

SCORES = ("chair_i", "chair_s", "recall", "unfounded", "all_right", "mean_mentions")


def judged(texts: Sequence[str], scenes: Sequence[SceneItem]) -> Result:
    """CHAIR's scores, and the two that count."""
    pictures = [Shown(item.id, item.image, frozenset(item.scene.kinds)) for item in scenes]
    result = chair_result(texts, pictures, SCENE_WORDS.mentions)
    named = [Counter(SCENE_WORDS.mentions(text)) for text in texts]
    there = [Counter(thing.kind for thing in item.scene.objects) for item in scenes]
    items = {
        "unfounded": np.array([(n - t).total() for n, t in zip(named, there, strict=True)]),
        "all_right": np.array([int(n == t) for n, t in zip(named, there, strict=True)]),
    }
    ratios = {"unfounded": Ratio("unfounded", "mentions"), "all_right": Ratio("all_right")}
    return replace(result, items=result.items | items, ratios=result.ratios | ratios)


def unseen_scenes(count: int) -> list[SceneItem]:
    """The held-out ones first; the further ones are of seeds that nothing else uses."""
    scenes: list[SceneItem] = []
    for block, first in enumerate(range(0, count, HELD_OUT_COUNT)):
        size = min(count - first, HELD_OUT_COUNT)
        drawn = scene_items(None, size, HELD_OUT_SEED + block * 1_000_000)
        scenes += [replace(item, id=f"{block}-{item.id}") for item in drawn]
    return scenes


def shown(value: Interval, sign: str = "") -> str:
    low, high = (format(v, f"{sign}.3f") for v in (value.low, value.high))
    return f"{format(value.estimate, f'{sign}.3f')} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a fine-tuned model's directory: demo/model")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--best-of", type=int, default=8)
    parser.add_argument("--temperature", type=float, help="of the samples; default: best_of's own")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    given = parser.parse_args()

    scenes = unseen_scenes(given.scenes)
    keep_memory()
    model = CAFe.from_pretrained(given.model)
    asked = [user(item.image, PROMPT_CAPTION) for item in scenes]
    torch.manual_seed(given.seed)
    warmth = given.temperature or SAMPLING_TEMPERATURE
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "one sample": {"temperature": warmth},
        f"best_of={given.best_of}": {"temperature": warmth, "best_of": given.best_of},
    }
    found = []
    for options in ways.values():
        texts = model.generate(asked, max_new_tokens=MAX_NEW_TOKENS, **options)
        found.append(score_samples(judged(list(texts), scenes)))
    greedy, _, best = found
    heads = [*ways, "best_of - greedy"]
    print(f"{len(scenes)} scenes, temperature {warmth}\n")
    print((f"{'':<14}" + "".join(f"{head:<23}" for head in heads)).rstrip())
    for name in SCORES:
        cells = [shown(percentile_interval(scores[name])) for scores in found]
        change = percentile_interval(best[name] - greedy[name])
        print(
            f"{name:<14}" + "".join(f"{cell:<23}" for cell in [*cells, shown(change, "+")]).rstrip()
        )
    change = percentile_interval(best["chair_i"] - greedy["chair_i"])
    print(f"\nchair_change: {shown(change, '+')}")


if __name__ == "__main__":
    main()
