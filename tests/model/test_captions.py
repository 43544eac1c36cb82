"""An embedding with the model's own caption is the mean of two embeddings, in every way to ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch

from cafe.errors import DataError
from cafe.index import Index
from cafe.model.captions import CAPTION_WEIGHT, with_captions
from cafe.model.vlm import CAFe
from cafe.retrieval.embed import embed_dataset
from cafe.retrieval.indexing import build_index
from cafe.retrieval.search import Searcher
from cafe.types import CAPTION_REQUEST, Image, user
from helpers.images import noise
from helpers.marks import slow

WORDS = "a red mug"


@pytest.fixture(scope="module")
def model() -> CAFe:
    return CAFe.from_pretrained("tiny", device="cpu")


@pytest.fixture
def images() -> list[PIL.Image.Image]:
    return [noise(seed, 96, 96) for seed in range(3)]


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_the_mean_of_two_directions_by_hand():
    image = torch.tensor([[2.0, 0.0], [5.0, 5.0]])
    caption = torch.tensor([[0.0, 9.0]])
    mixed = with_captions(image, caption, [0], 0.75)
    # (1/4, 3/4) of length one; the row without a caption keeps even its length.
    expected = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    expected[0] /= 10**0.5
    torch.testing.assert_close(mixed, expected)
    assert with_captions(image, caption[:0], [], 0.75) is image


def test_a_caption_is_the_answer_to_the_request(model: CAFe, images: list[Any]):
    written = model.write_captions([images[0], WORDS, {"text": WORDS, "image": images[1]}])
    asked = model.generate(user(Image(images[0]), CAPTION_REQUEST), max_new_tokens=64)
    assert written == [asked, None, None]
    (short,) = model.write_captions([images[0]], max_new_tokens=2)
    assert short is not None
    assert str(asked).startswith(short)
    assert len(short) < len(str(asked))


@pytest.mark.parametrize("weight", [0.3, *slow(0.0, CAPTION_WEIGHT, 1.0)])
def test_encode_is_the_mean_of_what_it_gives_for_both(
    model: CAFe, images: list[Any], weight: float
):
    inputs = [images[0], WORDS, images[1], {"text": WORDS, "image": images[2]}]
    captions = model.write_captions(inputs)
    mixed = model.encode(inputs, caption=True, caption_weight=weight)
    plain = model.encode(inputs)
    texts = model.encode([captions[0], captions[2]])
    expected = plain.copy()
    expected[[0, 2]] = unit((1 - weight) * plain[[0, 2]] + weight * texts)
    np.testing.assert_allclose(mixed, expected, atol=2e-6)
    given = model.encode(inputs, caption=captions, caption_weight=weight)
    np.testing.assert_allclose(given, mixed, atol=2e-6)
    if weight:
        assert np.abs(mixed[0] - plain[0]).max() > 1e-3, "the caption changes nothing"


@pytest.mark.slow
def test_one_input_a_short_vector_and_a_compact_one(model: CAFe, images: list[Any]):
    whole = model.encode(images, caption=True)
    single = model.encode(images[0], caption=True)
    assert single.shape == whole[0].shape
    np.testing.assert_allclose(single, whole[0], atol=2e-6)
    short = model.encode(images, caption=True, truncate_dim=8)
    np.testing.assert_allclose(short, unit(whole[:, :8]), atol=2e-6)
    half = model.encode(images, caption=True, precision="float16")
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, whole, atol=1e-3)


def test_a_model_that_says_nothing_embeds_the_image(small_dir: Path, images: list[Any]):
    silent = CAFe.from_pretrained(small_dir)
    assert silent.generate(user(Image(images[0]), CAPTION_REQUEST)) == ""
    assert silent.write_captions(images) == [None] * 3
    np.testing.assert_allclose(
        silent.encode(images, caption=True), silent.encode(images), atol=2e-6
    )


def test_empty_captions_leave_the_image_as_it_is(model: CAFe, images: list[Any]):
    plain = model.encode(images)
    same = model.encode(images, caption=[None, "", " \n"])
    np.testing.assert_allclose(same, plain, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption": ["a"]}, "caption: 1 captions for 3 inputs"),
        ({"caption": ["a", None, 3]}, "caption 2 is int"),
        ({"caption": True, "caption_weight": 1.5}, "caption_weight=1.5: use 0"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    model: CAFe, images: list[Any], options: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        model.encode(images, **options)


# ------------------------------------------------------------------ files and indexes


@pytest.fixture
def folder(tmp_path: Path, images: list[Any]) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return folder


@pytest.mark.slow
def test_an_index_keeps_captions_and_is_followed_with_them(
    model: CAFe, images: list[Any], folder: Path, tmp_path: Path
):
    to = tmp_path / "photos.index"
    report = build_index("tiny", folder, to, caption=True)
    assert (report.rows, report.changes.added) == (3, 3)
    captions = model.write_captions(images)
    expected = model.encode(images, caption=captions)
    index = Index.open(to)
    stored = index.stored([f"{i}.png" for i in range(3)])
    for number in range(3):
        row = stored[f"{number}.png"]
        assert row.generated_caption == captions[number]
        np.testing.assert_allclose(row.vector, expected[number], atol=5e-6)

    # What moved keeps its caption; what is new gets one, without being asked for again.
    (folder / "0.png").rename(folder / "moved.png")
    noise(7, 60, 50).save(folder / "new.png")
    changes = build_index("tiny", folder, to).changes
    assert (changes.added, changes.moved, changes.unchanged, changes.deleted) == (1, 1, 2, 1)
    searcher = Searcher.open(to)
    hits = {hit.id: hit for hit in searcher.search(images[1], caption=True)}
    assert hits["1.png"].score == pytest.approx(1, abs=1e-5)
    assert hits["moved.png"].hit.metadata["generated_caption"] == captions[0]
    assert all(hit.hit.metadata["generated_caption"] for hit in hits.values())
    assert searcher.index.count("generated_caption LIKE '%'") == 4
    plain = {hit.id: hit for hit in searcher.search(images[1])}
    assert plain["1.png"].score < 0.9999

    with pytest.raises(DataError, match="was made with captions; index"):
        build_index("tiny", folder, to, caption=False)


def test_an_index_without_captions_stays_without(folder: Path, tmp_path: Path):
    to = tmp_path / "plain.index"
    build_index("tiny", folder, to)
    assert "generated_caption" not in Index.open(to).columns
    with pytest.raises(DataError, match="was made without captions"):
        build_index("tiny", folder, to, caption=True)


@pytest.mark.slow
def test_embed_writes_captions_beside_the_vectors(
    model: CAFe, images: list[Any], folder: Path, tmp_path: Path
):
    captions = model.write_captions(images)
    expected = model.encode(images, caption=captions)
    one = tmp_path / "one.parquet"
    embed_dataset("tiny", folder, one, caption=True)
    shards = tmp_path / "shards"
    embed_dataset("tiny", folder, shards, shard_size=2, caption=True)
    for path in (one, shards):
        table = pq.read_table(sorted(path.glob("*.parquet")) if path.is_dir() else path)
        assert table["generated_caption"].to_pylist() == captions
        vectors = np.array(table["embedding"].to_pylist(), np.float32)
        np.testing.assert_allclose(vectors, expected, atol=5e-6)
    plan = json.loads((shards / "shards.json").read_text())
    assert plan["model"]["caption"] == CAPTION_WEIGHT
    with pytest.raises(DataError, match="another model"):
        embed_dataset("tiny", folder, shards, shard_size=2)

    table = tmp_path / "table"
    embed_dataset("tiny", folder, to=table, caption=True)
    stored = Index.open(table).stored([f"{i}.png" for i in range(3)])
    assert [stored[f"{i}.png"].generated_caption for i in range(3)] == captions
    texts = tmp_path / "texts.txt"
    texts.write_text(f"{WORDS}\n", encoding="utf-8")
    report = embed_dataset("tiny", texts, caption=True)
    np.testing.assert_allclose(report.embeddings, model.encode([WORDS]), atol=5e-6)
