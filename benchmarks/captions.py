"""What does the model's own caption add to an image's embedding, and with which weight?

    python benchmarks/captions.py MODEL [--scenes 500] [--seed 30000] [--batch-size 64]

Scenes that neither `cafe evaluate` nor the demo is measured on (another seed of the test split) are
embedded, and described by the model. For each weight of the caption the table has R@1 in both
directions, the accuracy on captions with one wrong word or with two objects that have traded
places, and the modality gap. The last lines give seconds per 1,000 images for both ways of
embedding, of this run, and `best_weight: W`, by the mean of both R@1; the smaller of equal ones.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from cafe.evaluation.scenes.held_out import scene_items
from cafe.evaluation.scenes.retrieval import scenes_retrieval
from cafe.evaluation.scoring import score_samples
from cafe.memory import keep_memory
from cafe.metrics import modality_gap
from cafe.model.captions import CAPTION_WEIGHT, with_captions
from cafe.model.vlm import CAFe
from cafe.types import Image

WEIGHTS = (0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=30_000)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    keep_memory()
    model = CAFe.from_pretrained(options.model)
    scenes = scene_items(None, options.scenes, options.seed)
    images = [item.image for item in scenes]
    captions, writing = timed(lambda: model.write_captions(images, batch_size=options.batch_size))
    plain, embedding = timed(lambda: encoded(model, images, options.batch_size))
    written = [i for i, text in enumerate(captions) if text]
    said = encoded(model, [captions[i] for i in written], options.batch_size)
    texts: dict[str, np.ndarray] = {}

    def score(weight: float) -> dict[str, float]:
        mixed = with_captions(plain, said, written, weight)
        unit = torch.nn.functional.normalize(mixed, dim=1).numpy()

        def encode(inputs: list) -> np.ndarray:
            if isinstance(inputs[0], Image):
                return unit
            new = [text for text in dict.fromkeys(inputs) if text not in texts]
            texts.update(zip(new, model.encode(new, batch_size=options.batch_size), strict=True))
            return np.stack([texts[text] for text in inputs])

        result = scenes_retrieval(encode, scenes)
        scores = {
            name: float(values[0]) for name, values in score_samples(result, resamples=1).items()
        }
        scores["gap"] = modality_gap(unit, encode([item.caption for item in scenes]))
        return scores

    names = {
        "image_to_text_recall@1": "I->T R@1",
        "text_to_image_recall@1": "T->I R@1",
        "hard_word_accuracy": "one word",
        "hard_order_accuracy": "places",
        "gap": "gap",
    }
    print(f"{len(scenes)} scenes of seed {options.seed}, {len(written)} with a caption")
    print("weight  " + "".join(f"{name:>10}" for name in names.values()))
    recall: dict[float, float] = {}
    for weight in WEIGHTS:
        scores = score(weight)
        recall[weight] = scores["image_to_text_recall@1"] + scores["text_to_image_recall@1"]
        print(f"{weight:<8.3f}" + "".join(f"{scores[name]:>10.3f}" for name in names))
    print(f"seconds per 1,000 images: {1000 * embedding / len(scenes):.1f} alone, ", end="")
    print(f"{1000 * (embedding + writing) / len(scenes):.1f} with captions, and their embedding")
    print(f"default_weight: {CAPTION_WEIGHT}")
    print(f"best_weight: {max(recall, key=recall.__getitem__)}")


def encoded(model: CAFe, inputs: list, batch_size: int) -> torch.Tensor:
    return torch.from_numpy(model.encode(inputs, batch_size=batch_size))


def timed(work) -> tuple:
    begin = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begin


if __name__ == "__main__":
    main()
