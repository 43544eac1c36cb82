"""Does reranking find more? Text→image R@1 of `cafe search` with and without `--rerank`.

    python benchmarks/rerank.py MODEL [--scenes 2000] [--captions 200] [--rerank 20] [--seed 50000]

Scenes of the split "test" are drawn by seed, written and indexed by `cafe index`; the captions of
the first are searched for. A hit is right if its picture holds just the things that the caption
names (and its background, where the caption names it), so twins are no mistakes. The reranked order
is that of the function behind `cafe search --rerank`; `match alone` is the order by the model's
answer only. Intervals are bootstrap ones over captions, 95 %. Last line: `rerank_gain: X [low,
high]`, reranked minus plain, paired.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from cafe.cli.found import reranked
from cafe.cli.index_model import open_model
from cafe.data.scenes import Scene, read_truth, write_scenes
from cafe.index import Index
from cafe.metrics import bootstrap_interval, paired_interval


def holds(scene: Scene, told: Scene, caption: str) -> bool:
    """Whether `scene` is what `caption`, a caption of `told`, says."""
    same = things(scene) == things(told)
    return same and (scene.background == told.background or "background" not in caption)


def things(scene: Scene) -> Counter[tuple[str, str, str]]:
    return Counter((item.size, item.kind, item.place) for item in scene.objects)


def shown(name: str, right: np.ndarray) -> str:
    share = bootstrap_interval(right)
    return f"{name:<18}{share.estimate:.3f} [{share.low:.3f}, {share.high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a fine-tuned model's directory: demo/model")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--rerank", type=int, default=20, help="the so many best hits")
    parser.add_argument("--seed", type=int, default=50_000)
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        scenes, to = Path(folder, "scenes"), Path(folder, "index")
        write_scenes(scenes, given.scenes, given.seed, split="test", questions_per_scene=1)
        command = [sys.executable, "-m", "cafe", "index", given.model, str(scenes), "--to", str(to)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        index = Index.open(str(to))
        vlm, _ = open_model(given.model, index)
        truth = {entry.image: entry for entry in read_truth(scenes)}
        asked = list(truth.values())[: given.captions]
        right = []
        vectors = vlm.encode([entry.caption for entry in asked])
        for entry, vector in zip(asked, vectors, strict=True):
            hits = index.search(vector, given.rerank)
            found = reranked(vlm, index.origin, entry.caption, hits, given.rerank)
            by_match = max(found, key=lambda one: one.match or 0.0)
            good = {hit.id: holds(truth[hit.id].scene, entry.scene, entry.caption) for hit in hits}
            first = (hits[0], by_match.hit, found[0].hit)
            right.append([*(good[hit.id] for hit in first), any(good.values())])

    print(f"{given.scenes:,} pictures, {len(asked)} captions, the {given.rerank} best reranked\n")
    cosine, match, both, within = np.array(right).T
    print(shown("R@1, cosine", cosine))
    print(shown("R@1, match alone", match))
    print(shown("R@1, reranked", both))
    print(shown(f"R@{given.rerank}", within), "\n")
    gain = paired_interval(both, cosine)
    print(f"rerank_gain: {gain.estimate:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")


if __name__ == "__main__":
    main()
