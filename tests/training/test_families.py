"""`cafe train` on every family: images, several images and a video, then what users call."""

from __future__ import annotations

import json
import math
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest

from cafe.model.vlm import CAFe
from cafe.recipes import load_recipe
from cafe.training.run import train
from helpers import builders

pytestmark = pytest.mark.slow  # every test trains

RECIPE = """\
model: {model}
output_dir: {out}
data:
  - {{path: {data}/talk.json, mode: caption}}
  - {{path: {data}/pairs.jsonl}}
  - {{path: {data}/words.json, mode: chat}}
batch: {{examples: 3, chunk: 2, workers: 0, max_frames: 2}}
optimizer: {{learning_rate: 1e-3}}
schedule: {{steps: 3, warmup: 0}}
precision: fp32
log: {{progress: false}}
"""
TEXTS = ("a big red cat", "a cat at the top left", "no small cat")


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of an image, of two and of a video; pairs of documents of two pages; words only."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
    with av.open(str(folder / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        # Images and frames share a batch; two families need them of one size then.
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(6):
            pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    talk = [
        {"image": "0.png", "conversations": turns("<image>\nWhat is it?", TEXTS[0])},
        {"images": ["1.png", "2.png"], "conversations": turns("<image><image>What?", TEXTS[1])},
        {"video": "film.mp4", "conversations": turns("<video>\nWhat is it?", TEXTS[2])},
    ]
    pages = [[{"role": "user", "content": "<image><image>"}]]
    pairs = [
        {
            "messages": [{"role": "user", "content": TEXTS[i]}],
            "positive_messages": pages,
            "positive_images": [[f"{2 * i}.png", f"{2 * i + 1}.png"]],
        }
        for i in range(3)
    ]
    words = [{"conversations": turns("Is it a cat?", text)} for text in TEXTS]
    (folder / "talk.json").write_text(json.dumps(talk))
    (folder / "words.json").write_text(json.dumps(words))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    return folder


@pytest.mark.parametrize("name", builders.NAMES)
def test_a_family_trains_on_mixed_data_and_is_there_again(
    name: str, data: Path, tmp_path: Path
) -> None:
    base = builders.build(name, tmp_path / "base")
    file = tmp_path / "run.yaml"
    file.write_text(RECIPE.format(model=base, out=tmp_path / "run", data=data))
    result = train(load_recipe(file))
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()
    learnt = [(r.contrastive > 0, r.language > 0) for r in result.records]
    # Captions, documents (their targets are no answers), words: each source once.
    assert sorted(learnt) == [(False, True), (True, False), (True, True)]
    assert all(math.isfinite(r.loss) and r.gradient_norm > 0 for r in result.records)

    before, after = CAFe.from_pretrained(base), CAFe.from_pretrained(result.model_dir)
    image = data / "0.png"
    asked = ["a cat", image, {"text": "which", "image": [image, data / "1.png"]}]
    embeddings = after.encode(asked)
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx(1, abs=1e-5)
    assert np.abs(embeddings - before.encode(asked)).max() > 1e-3
    answer = after.generate({"image": image, "text": "What is it?"}, max_new_tokens=3)
    after.save_pretrained(tmp_path / "again")
    again = CAFe.from_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(again.encode(asked), embeddings)
    assert again.generate({"image": image, "text": "What is it?"}, max_new_tokens=3) == answer
