"""Images and texts per second against sentence-transformers: one directory, one device, one run.

    python benchmarks/encode.py [--model DIR] [--count 512] [--repeats 5] [--device cpu]

Both sides load the same checkpoint directory and embed the same scenes, image files as well as
texts: captions, short queries, and descriptions of several captions. Reading the image files is
part of the measured time: ours by path, theirs as `PIL.Image.open(path)`, which decodes lazily.
Both use their default batch size of 32. Embeddings must agree within 1e-5 in fp32.

Each side has its own process and runs as its users run it: `cafe` keeps freed memory
(`cafe.memory`), as `cafe embed` does. A third process, sentence-transformers with kept memory,
shows how much of the gain comes from that (`ratio_same_memory`). The sides alternate, in an order
that is reversed every time, and the medians are compared. The last line is `ratio: X`: their time
for images and texts together, divided by ours.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from cafe.data.scenes.write import Truth, read_truth, write_scenes
from cafe.memory import keep_memory
from cafe.model.tiny import TINY_DIR
from cafe.model.vlm import CAFe

TOLERANCE = 1e-5
OURS, THEIRS, THEIRS_KEEPING = "cafe", "sentence-transformers", "the same, memory kept"
MODALITIES = "images", "texts"


def texts_of(scenes: list[Truth]) -> list[str]:
    """Texts of mixed length: half captions, a quarter queries, a quarter long descriptions."""
    texts = []
    for i, truth in enumerate(scenes):
        first = truth.scene.objects[0]
        if i % 4 == 0:
            texts.append(f"a {first.size} {first.kind}")
        elif i % 4 == 1:
            others = [scenes[(i + j) % len(scenes)].caption for j in range(2 + i % 7)]
            texts.append(" ".join(others))
        else:
            texts.append(truth.caption)
    return texts


def encoder(side: str, model: Path, device: str) -> Callable[[list[Any]], Any]:
    if side == OURS:
        ours = CAFe.from_pretrained(model, dtype=torch.float32, device=device)
        return ours.encode

    # Imported after cafe, which makes a CPU-only torch work with the torchvision of PyPI.
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(model), device=device, model_kwargs={"dtype": torch.float32})

    def encode(inputs: list[Any]) -> Any:
        opened = [PIL.Image.open(i) if isinstance(i, Path) else i for i in inputs]
        return theirs.encode(opened, show_progress_bar=False)

    return encode


def one_side(side: str, model: Path, device: str, scenes: Path, connection: Connection) -> None:
    """One process: for each modality received, send back the seconds and the embeddings."""
    if side != THEIRS:
        keep_memory()
    encode = encoder(side, model, device)
    truths = read_truth(scenes)
    inputs = {"images": [scenes / t.image for t in truths], "texts": texts_of(truths)}
    while (modality := connection.recv()) is not None:
        begin = time.perf_counter()
        embeddings = encode(inputs[modality])
        connection.send((time.perf_counter() - begin, embeddings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=TINY_DIR, help="a checkpoint directory")
    parser.add_argument("--count", type=int, default=512, help="number of images, and of texts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    sides: dict[str, Connection] = {}
    with tempfile.TemporaryDirectory() as folder:
        scenes = Path(folder) / "scenes"
        write_scenes(scenes, arguments.count, seed=11, questions_per_scene=1)
        for side in (OURS, THEIRS, THEIRS_KEEPING):
            sides[side], end = context.Pipe()
            settings = side, arguments.model, arguments.device, scenes, end
            context.Process(target=one_side, args=settings, daemon=True).start()
        print(
            f"fp32, {arguments.device}, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}; {arguments.count} images and {arguments.count} texts"
        )
        measure(sides, arguments.count, arguments.repeats)
        for connection in sides.values():
            connection.send(None)


def measure(sides: dict[str, Connection], count: int, repeats: int) -> None:
    def run(side: str, modality: str) -> tuple[float, np.ndarray]:
        sides[side].send(modality)
        return sides[side].recv()

    total = dict.fromkeys(sides, 0.0)
    for modality in MODALITIES:
        embeddings = {side: run(side, modality)[1] for side in sides}  # also the warm-up
        difference = float(np.abs(embeddings[OURS] - embeddings[THEIRS]).max())
        assert difference <= TOLERANCE, f"{modality}: embeddings differ by {difference:.1e}"
        times: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(repeats):
            for side in sorted(sides, reverse=turn % 2 == 1):
                times[side].append(run(side, modality)[0])
        for side, seconds in times.items():
            total[side] += statistics.median(seconds)
        speeds = (f"{side} {count / statistics.median(times[side]):.0f} /s" for side in sides)
        print(f"{modality}: {', '.join(speeds)}; largest difference {difference:.1e}")
    print(f"ratio_same_memory: {total[THEIRS_KEEPING] / total[OURS]:.2f}")
    print(f"ratio: {total[THEIRS] / total[OURS]:.2f}")


if __name__ == "__main__":
    main()
