"""Pictures and texts per second against sentence-transformers: one directory, one device, one run.

    python benchmarks/encode.py [--model DIR] [--count 512] [--repeats 5] [--device cpu]

Both sides load the same checkpoint directory and embed the same scenes, picture files as well as
texts: captions, short queries, and descriptions of several captions. Pictures are read from their
files inside the measured time: ours by path, theirs as `PIL.Image.open(path)`, which decodes late.
Both have their default batch size of 32. Sides take turns, the first of a turn changes, and the
medians are compared. Embeddings must be equal to 1e-5 in fp32. The last line is `ratio: X`: their
time for the pictures and the texts together, over ours.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from cafe.data.scenes.write import Truth, read_truth, write_scenes
from cafe.model.tiny import TINY_DIR
from cafe.model.vlm import CAFe

TOLERANCE = 1e-5


def texts_of(scenes: list[Truth]) -> list[str]:
    """Of mixed length: half are captions, a quarter queries, a quarter long descriptions."""
    texts = []
    for i, truth in enumerate(scenes):
        thing = truth.scene.objects[0]
        if i % 4 == 0:
            texts.append(f"a {thing.size} {thing.kind}")
        elif i % 4 == 1:
            others = [scenes[(i + j) % len(scenes)].caption for j in range(2 + i % 7)]
            texts.append(" ".join(others))
        else:
            texts.append(truth.caption)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=TINY_DIR, help="a checkpoint directory")
    parser.add_argument("--count", type=int, default=512, help="pictures, and as many texts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()

    # After cafe, which lets a CPU-only torch go with the registry's torchvision.
    from sentence_transformers import SentenceTransformer

    ours = CAFe.from_pretrained(given.model, dtype=torch.float32, device=given.device)
    theirs = SentenceTransformer(
        str(given.model), device=given.device, model_kwargs={"dtype": torch.float32}
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "scenes"
        write_scenes(root, given.count, seed=11, questions_per_scene=1)
        scenes = read_truth(root)
        paths, texts = [root / truth.image for truth in scenes], texts_of(scenes)
        measure(ours, theirs, paths, texts, given.repeats)


def measure(ours: CAFe, theirs: Any, paths: list[Path], texts: list[str], repeats: int) -> None:
    def their_pictures() -> Any:
        return theirs.encode([PIL.Image.open(path) for path in paths], show_progress_bar=False)

    sides: dict[str, dict[str, Callable[[], Any]]] = {
        "pictures": {"cafe": lambda: ours.encode(paths), "theirs": their_pictures},
        "texts": {
            "cafe": lambda: ours.encode(texts),
            "theirs": lambda: theirs.encode(texts, show_progress_bar=False),
        },
    }
    parameters = sum(p.numel() for p in ours.parameters())
    print(
        f"{parameters / 1e6:.1f}M parameters in fp32, {ours.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; {len(paths)} pictures, "
        f"{len(texts)} texts of {min(map(len, texts))} to {max(map(len, texts))} characters"
    )
    total: dict[str, float] = {"cafe": 0.0, "theirs": 0.0}
    for kind, runs in sides.items():
        found = {name: run() for name, run in runs.items()}  # also the warm-up
        difference = float(np.abs(found["cafe"] - found["theirs"]).max())
        assert difference <= TOLERANCE, f"{kind}: embeddings are {difference:.1e} apart"
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(repeats):
            for name in sorted(runs, reverse=turn % 2 == 1):
                begin = time.perf_counter()
                runs[name]()
                times[name].append(time.perf_counter() - begin)
        median = {name: statistics.median(values) for name, values in times.items()}
        for name, seconds in median.items():
            total[name] += seconds
        print(
            f"{kind:9s} cafe {len(paths) / median['cafe']:7.1f} /s   sentence-transformers "
            f"{len(paths) / median['theirs']:7.1f} /s   largest difference {difference:.1e}   "
            f"ratio {median['theirs'] / median['cafe']:.2f}"
        )
    print(f"ratio: {total['theirs'] / total['cafe']:.2f}")


if __name__ == "__main__":
    main()
