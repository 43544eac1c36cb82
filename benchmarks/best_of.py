"""Does the model choose its more faithful descriptions? CHAIR of `best_of` against greedy.

    python benchmarks/best_of.py MODEL [--scenes 500] [--best-of 8] [--temperature T] [--seed 0]

The held-out scenes of `cafe evaluate` (and, beyond the first 500, further scenes sampled in the
same way) are described greedily, by one sample, and by `generate(best_of=…)`, which chooses among
the greedy description and samples. CHAIR is the share of mentioned objects that are not in the
image (i), or of descriptions with such a mention (s). It ignores omitted objects, and an object
mentioned twice counts as two correct mentions. The benchmark therefore reports in addition:

    recall       share of the present object classes that are mentioned
    unfounded    share of mentions without an object of their own: the class is absent, or mentioned
                 more often than it is present
    all_right    share of descriptions that mention every object, as often as it is present, and
                 nothing else

Intervals are 95 % bootstrap intervals over images; the differences are paired. The last line is
`chair_change: X [low, high]`, CHAIR-i of best_of minus that of greedy; below 0 is better.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cafe.evaluation.scenes.hallucination import SCENE_WORDS
from cafe.evaluation.scenes.held_out import HELD_OUT_COUNT, HELD_OUT_SEED, SceneItem, scene_items
from cafe.evaluation.scoring import Ratio, score_samples
from cafe.evaluation.task import TaskResult
from cafe.evaluation.tasks.caption import MAX_NEW_TOKENS
from cafe.evaluation.tasks.chair import AnnotatedImage, chair_result
from cafe.memory import keep_memory
from cafe.metrics import Interval, percentile_interval
from cafe.model.best_of import SAMPLING_TEMPERATURE
from cafe.model.vlm import CAFe
from cafe.types import CAPTION_REQUEST, user

SCORES = ("chair_i", "chair_s", "recall", "unfounded", "all_right", "mean_mentions")


def chair_and_counts(texts: Sequence[str], scenes: Sequence[SceneItem]) -> TaskResult:
    """CHAIR's scores, and the two that count objects."""
    images = [AnnotatedImage(item.id, item.image, frozenset(item.scene.classes)) for item in scenes]
    result = chair_result(texts, images, SCENE_WORDS.mentions)
    mentioned = [Counter(SCENE_WORDS.mentions(text)) for text in texts]
    present = [Counter(shown.kind for shown in item.scene.objects) for item in scenes]
    items = {
        "unfounded": np.array([(m - p).total() for m, p in zip(mentioned, present, strict=True)]),
        "all_right": np.array([int(m == p) for m, p in zip(mentioned, present, strict=True)]),
    }
    ratios = {"unfounded": Ratio("unfounded", "mentions"), "all_right": Ratio("all_right")}
    return replace(result, items=result.items | items, ratios=result.ratios | ratios)


def unseen_scenes(count: int) -> list[SceneItem]:
    """The held-out scenes first; the further ones have seeds that nothing else uses."""
    scenes: list[SceneItem] = []
    for block, first in enumerate(range(0, count, HELD_OUT_COUNT)):
        size = min(count - first, HELD_OUT_COUNT)
        drawn = scene_items(None, size, HELD_OUT_SEED + block * 1_000_000)
        scenes += [replace(item, id=f"{block}-{item.id}") for item in drawn]
    return scenes


def formatted(value: Interval, sign: str = "") -> str:
    low, high = (format(v, f"{sign}.3f") for v in (value.low, value.high))
    return f"{format(value.estimate, f'{sign}.3f')} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="directory of a fine-tuned model, such as demo/model")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--best-of", type=int, default=8)
    parser.add_argument("--temperature", type=float, help="default: that of best_of")
    parser.add_argument("--seed", type=int, default=0, help="sampling seed")
    arguments = parser.parse_args()

    scenes = unseen_scenes(arguments.scenes)
    keep_memory()
    model = CAFe.from_pretrained(arguments.model)
    prompts = [user(item.image, CAPTION_REQUEST) for item in scenes]
    torch.manual_seed(arguments.seed)
    temperature = arguments.temperature or SAMPLING_TEMPERATURE
    methods: dict[str, dict[str, Any]] = {
        "greedy": {},
        "one sample": {"temperature": temperature},
        f"best_of={arguments.best_of}": {"temperature": temperature, "best_of": arguments.best_of},
    }
    samples = []
    for options in methods.values():
        texts = model.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, **options)
        samples.append(score_samples(chair_and_counts(list(texts), scenes)))
    greedy, _, best = samples
    heads = [*methods, "best_of - greedy"]
    print(f"{len(scenes)} scenes, temperature {temperature}\n")
    print((f"{'':<14}" + "".join(f"{head:<23}" for head in heads)).rstrip())
    for name in SCORES:
        cells = [formatted(percentile_interval(scores[name])) for scores in samples]
        change = percentile_interval(best[name] - greedy[name])
        print(
            f"{name:<14}"
            + "".join(f"{cell:<23}" for cell in [*cells, formatted(change, "+")]).rstrip()
        )
    change = percentile_interval(best["chair_i"] - greedy["chair_i"])
    print(f"\nchair_change: {formatted(change, '+')}")


if __name__ == "__main__":
    main()
