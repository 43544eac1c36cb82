"""Published families on real photographs: encode, train, export."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cafe.data.read import read_examples
from cafe.data.records import ReadOptions
from cafe.model.vlm import CAFe
from cafe.recipes import load_recipe
from cafe.release.release import export
from cafe.training.run import train
from helpers.real import material

pytestmark = pytest.mark.real

RECIPE = """\
model: {model}
output_dir: {out}
data: [{{path: {data}}}]
batch: {{examples: 3, chunk: 2, workers: 0}}
optimizer: {{learning_rate: 1e-3}}
schedule: {{steps: 2, warmup: 0}}
precision: fp32
checkpoint: {{every_steps: 100}}
log: {{progress: false}}
"""


@pytest.fixture(scope="session")
def photographs() -> list[Path]:
    return sorted(material("coco/train2017").glob("*.jpg"))


@pytest.fixture(scope="session")
def captioned(photographs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first captions of four photographs, whose longer side is 224 px at most."""
    import PIL.Image

    folder = tmp_path_factory.mktemp("captioned")
    coco = json.loads(material("coco/captions_train2017.json").read_text())
    texts = {entry["image_id"]: entry["caption"] for entry in reversed(coco["annotations"])}
    lines = []
    for path in photographs[:4]:
        with PIL.Image.open(path) as image:
            image.thumbnail((224, 224))
            image.save(folder / path.name)
        lines.append(json.dumps({"file_name": path.name, "text": texts[int(path.stem)]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_photographs_embed_the_same_alone_and_in_a_batch(
    published: Any, photographs: list[Path]
) -> None:
    inputs: list[Any] = [photographs[0], "A red mug on a table.", photographs[1]]
    inputs.append({"image": photographs[1], "text": "what is to the left"})
    batched = published.encode(inputs)
    for given, embedding in zip(inputs, batched, strict=True):
        assert np.abs(published.encode(given) - embedding).max() <= 1e-5
    assert np.linalg.norm(batched, axis=1) == pytest.approx(1, abs=1e-5)
    apart = np.linalg.norm(batched[:, None] - batched[None], axis=-1)
    others = ~np.eye(len(inputs), dtype=bool)
    assert apart[others].min() > 1e-3, "the inputs differ, so equality says something"


@pytest.mark.slow
def test_a_published_family_trains_and_every_tool_reads_it(
    published_dir: Path, captioned: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RECIPE.format(model=published_dir, out=tmp_path / "run", data=captioned))
    result = train(load_recipe(file))
    assert all(math.isfinite(r.loss) and r.gradient_norm > 0 for r in result.records)
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()
    before = CAFe.from_pretrained(published_dir, dtype=torch.float32, device="cpu")
    after = CAFe.from_pretrained(result.model_dir, dtype=torch.float32, device="cpu")
    asked = ["a mug", next(captioned.glob("*.jpg"))]
    assert np.abs(before.encode(asked) - after.encode(asked)).max() > 1e-3
    report = export(result.model_dir, tmp_path / "out", verify=True)
    assert [a.tool.split()[0] for a in report.agreements] == [
        *("transformers", "sentence-transformers", "cafe")
    ]


@pytest.mark.parametrize("language", ["en", "fr", "ja"])
def test_drawings_are_read_with_descriptions_of_many_languages(
    language: str, tmp_path: Path, command_line: Any
) -> None:
    folder = material("stamps")
    known = json.loads((folder / "descriptions.json").read_text())
    described = {name: texts[language] for name, texts in known.items() if language in texts}
    if language == "en":
        described = {
            path.name: path.with_suffix(".txt").read_text().splitlines()[0]
            for path in sorted(folder.glob("*.png"))
        }
    assert len(described) > 20
    lines = [
        json.dumps({"file_name": name, "text": text}, ensure_ascii=False)
        for name, text in described.items()
    ]
    table = tmp_path / f"{language}.jsonl"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    records = read_examples(table, ReadOptions(image_root=folder))
    assert not records.skipped
    assert [e.target[0].text for e in records.examples if e.target] == [
        text.strip() for text in described.values()
    ]
    code, out, err = command_line("data", "inspect", table, f"image_root={folder}", "--count", 1)
    assert (code, err) == (0, "")
    assert out.startswith(f"{table}: format captions, {len(described)} examples, 0 records skipped")
