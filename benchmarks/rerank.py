"""Does reranking improve search? Text→image R@1 of `cafe search` with and without `--rerank`.

    python benchmarks/rerank.py MODEL [--scenes 2000] [--captions 200] [--rerank 20] [--seed 50000]

Scenes of the split "test" are generated from a seed and indexed by `cafe index`; the captions of
the first ones are the queries. A hit is correct if its image contains exactly the objects that the
caption names (and has its background, if the caption names one), so an image with the same content
is no error. The reranked order is that of the function behind `cafe search --rerank`; `match alone`
orders by the model's answer only, `by likelihood` as `--rerank-by likelihood` does. Intervals are
95 % bootstrap intervals over captions. The last lines are `rerank_gain: X [low, high]`, reranked
minus plain, paired, and `likelihood_gain`, the same by likelihood.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from cafe.data.scenes import Scene, read_truth, write_scenes
from cafe.metrics import bootstrap_interval, paired_interval
from cafe.model.vlm import CAFe
from cafe.retrieval.search import Searcher


def fits(scene: Scene, source: Scene, caption: str) -> bool:
    """Whether `caption`, a caption of `source`, describes `scene` exactly."""
    same = contents(scene) == contents(source)
    return same and (scene.background == source.background or "background" not in caption)


def contents(scene: Scene) -> Counter[tuple[str, str, str]]:
    return Counter((item.size, item.kind, item.place) for item in scene.objects)


def formatted(name: str, correct: np.ndarray) -> str:
    share = bootstrap_interval(correct)
    return f"{name:<18}{share.estimate:.3f} [{share.low:.3f}, {share.high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a fine-tuned model's directory: demo/model")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--rerank", type=int, default=20, help="number of hits to rerank")
    parser.add_argument("--seed", type=int, default=50_000)
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        scenes, to = Path(folder, "scenes"), Path(folder, "index")
        write_scenes(scenes, given.scenes, given.seed, split="test", questions_per_scene=1)
        command = [sys.executable, "-m", "cafe", "index", given.model, str(scenes), "--to", str(to)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        vlm = CAFe.from_pretrained(given.model)
        searcher = Searcher.open(to, vlm)
        truth = {entry.image: entry for entry in read_truth(scenes)}
        asked = list(truth.values())[: given.captions]
        right = []
        vectors = vlm.encode([entry.caption for entry in asked])
        for entry, vector in zip(asked, vectors, strict=True):
            hits = searcher.search(vector, given.rerank)
            found = searcher.rerank(entry.caption, hits)
            by_match = max(found, key=lambda one: one.match or 0.0)
            likely = searcher.rerank(entry.caption, hits, by="likelihood")
            good = {hit.id: fits(truth[hit.id].scene, entry.scene, entry.caption) for hit in hits}
            first = (hits[0], by_match, found[0], likely[0])
            right.append([*(good[hit.id] for hit in first), any(good.values())])

    print(f"{given.scenes:,} images, {len(asked)} captions, the {given.rerank} best reranked\n")
    cosine, match, both, likely, within = np.array(right).T
    print(formatted("R@1, cosine", cosine))
    print(formatted("R@1, match alone", match))
    print(formatted("R@1, reranked", both))
    print(formatted("R@1, by likelihood", likely))
    print(formatted(f"R@{given.rerank}", within), "\n")
    for name, reranked in (("rerank", both), ("likelihood", likely)):
        gain = paired_interval(reranked, cosine)
        print(f"{name}_gain: {gain.estimate:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")


if __name__ == "__main__":
    main()
