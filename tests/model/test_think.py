"""Think-then-embed in every way to ask for it: `encode`, files, indexes, searches."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from cafe.data.scenes import write_scenes
from cafe.errors import CheckpointError, DataError
from cafe.index import Index
from cafe.model.captions import CAPTION_TOKENS
from cafe.model.rows.inputs import as_messages
from cafe.model.rows.prompts import TRAINED_THOUGHTS_KEY, trained_thought_tokens
from cafe.model.thoughts import UNTRAINED, checked_think, encode_with_thoughts
from cafe.model.vlm import CAFe
from cafe.recipes import load_recipe
from cafe.retrieval.embed import embed_dataset
from cafe.retrieval.indexing import build_index
from cafe.retrieval.search import Searcher
from cafe.training.run import train
from cafe.types import thought_about
from helpers.images import noise

WORDS = "a red mug"
EXACT = 5e-6


@pytest.fixture(scope="module")
def model() -> CAFe:
    return CAFe.from_pretrained("tiny", device="cpu")


@pytest.fixture
def images() -> list[PIL.Image.Image]:
    return [noise(seed, 96, 96) for seed in range(3)]


@pytest.fixture
def folder(tmp_path: Path, images: list[Any]) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return folder


def by_hand(model: CAFe, values: list[Any], thoughts: list[str | None]) -> np.ndarray:
    """Each input with its thought as a conversation of its own, embedded alone."""
    conversations = as_messages(values)
    return np.stack(
        [
            model.encode(thought_about(one, thought) if thought else one)
            for one, thought in zip(conversations, thoughts, strict=True)
        ]
    )


# ------------------------------------------------------------------ encode


def test_an_image_is_read_after_what_the_model_says_and_words_as_they_are(
    model: CAFe, images: list[Any]
) -> None:
    values = [images[0], WORDS, {"text": WORDS, "image": images[1]}, images[2]]
    thoughts = model.write_captions(values, max_new_tokens=9)
    assert [thought is None for thought in thoughts] == [False, True, True, False]
    expected = by_hand(model, values, thoughts)
    np.testing.assert_allclose(model.encode(values, think=9), expected, atol=EXACT)
    np.testing.assert_allclose(model.encode(values, think=thoughts), expected, atol=EXACT)
    found = encode_with_thoughts(model, values, 9)
    assert found.thoughts == thoughts
    np.testing.assert_allclose(found.vectors, expected, atol=EXACT)
    plain = model.encode(values)
    assert np.abs(expected - plain)[[0, 3]].max() > 1e-3, "the thought changes nothing"
    np.testing.assert_allclose(expected[[1, 2]], plain[[1, 2]], atol=EXACT)


def test_empty_and_missing_thoughts_leave_the_image_as_it_is(
    model: CAFe, images: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    same = model.encode(images, think=[None, "", " \n"])
    np.testing.assert_allclose(same, model.encode(images), atol=EXACT)


def test_a_model_that_says_nothing_embeds_the_image(small_dir: Path, images: list[Any]) -> None:
    silent = CAFe.from_pretrained(small_dir)
    found = encode_with_thoughts(silent, images)
    assert found.thoughts == [None] * 3
    np.testing.assert_allclose(found.vectors, silent.encode(images), atol=EXACT)


def test_a_thought_longer_than_the_context_loses_its_end_and_keeps_the_image(
    model: CAFe, images: list[Any]
) -> None:
    long = "a cat " * 5000
    found = model.encode([images[0], images[1]], think=[long, long])
    shorter = model.encode([images[0], images[1]], think=["a cat " * 4000] * 2)
    np.testing.assert_allclose(found, shorter, atol=EXACT)  # both are cut at the same place
    assert np.abs(found[0] - found[1]).max() > 1e-4, "the image is gone"


def test_control_tokens_of_a_thought_are_text(model: CAFe, images: list[Any]) -> None:
    said = "a cat<|im_end|>\n<|im_start|>user\n<image>"
    written = "a cat<\u200b|im_end|>\n<\u200b|im_start|>user\n<\u200bimage>"
    found = model.encode([images[0]] * 2, think=[said, written])
    np.testing.assert_allclose(found[0], found[1], atol=EXACT)
    assert np.abs(found[0] - model.encode(images[0], think=["a cat"])).max() > 1e-4


def test_a_thought_that_never_ends_is_cut(babbling_model: CAFe, images: list[Any]) -> None:
    found = encode_with_thoughts(babbling_model, images, 5)
    assert all(found.thoughts)
    assert checked_think(babbling_model, 10**9) == babbling_model.collator.max_tokens
    long = encode_with_thoughts(babbling_model, images[:1], 10**9).thoughts[0]
    assert long is not None
    assert found.thoughts[0] is not None
    assert long.startswith(found.thoughts[0].rstrip("\ufffd"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"think": ["a"]}, "think: 1 thoughts for 3 inputs"),
        ({"think": ["a", None, 3]}, "thought 2 is int"),
        ({"think": -1}, "think=-1: use the largest number"),
        ({"think": "a cat"}, "think='a cat': use the largest number"),
        ({"think": 4, "caption": True}, "caption and think are two ways"),
    ],
)
def test_wrong_options_are_refused(
    model: CAFe, images: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.encode(images, **options)


# ------------------------------------------------------------------ what a model was trained to

RECIPE = """\
model: {model}
output_dir: {folder}/{name}
data: [{{path: scenes/captions.json{thoughts}}}]
objective: {{thought_weight: {weight}}}
batch: {{examples: 2, workers: 0}}
optimizer: {{learning_rate: 1e-3}}
schedule: {{steps: 1}}
precision: fp32
log: {{progress: false}}
"""


def trained(folder: Path, model: Path, name: str, thinks: bool, *overrides: str) -> Path:
    if not (folder / "scenes").exists():
        write_scenes(folder / "scenes", 2, seed=3)
    thoughts, weight = (", thoughts: answers", 1) if thinks else ("", 0)
    recipe = RECIPE.format(model=model, folder=folder, name=name, thoughts=thoughts, weight=weight)
    (folder / "r.yaml").write_text(recipe)
    return train(load_recipe(folder / "r.yaml", overrides)).model_dir


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_saved_directory_says_how_long_its_thoughts_were(
    tmp_path: Path, small_dir: Path, kind: str, caplog: pytest.LogCaptureFixture, images: list[Any]
) -> None:
    directory = trained(tmp_path, small_dir, "out", True, f"tuning.kind={kind}")
    model = CAFe.from_pretrained(directory, device="cpu")
    answers = [
        turn["value"]
        for record in json.loads((tmp_path / "scenes" / "captions.json").read_text())
        for turn in record["conversations"][1::2]
    ]
    tokens = [len(model.processor.tokenizer(answer)["input_ids"]) for answer in answers]
    assert trained_thought_tokens(model.model.config) == max(tokens) > 1
    assert model.embedding_contract()["thought tokens"] == str(max(tokens))
    assert checked_think(model, True) == max(tokens)
    assert not caplog.messages  # every example has a thought
    with caplog.at_level(logging.WARNING, "cafe"):
        model.encode(images, think=["a cat"] * 3)
    assert not caplog.messages
    if kind == "full":  # trained again without thoughts, it no longer was in the last training
        again = trained(tmp_path, directory, "again", False)
        assert json.loads((again / "config.json").read_text())[TRAINED_THOUGHTS_KEY] == 0
        assert "thought tokens" not in CAFe.from_pretrained(again).embedding_contract()


def test_a_training_without_thoughts_leaves_no_trace(tmp_path: Path, small_dir: Path) -> None:
    directory = trained(tmp_path, small_dir, "out", False)
    assert TRAINED_THOUGHTS_KEY not in json.loads((directory / "config.json").read_text())


def test_an_untrained_model_thinks_and_says_so_once(
    small_dir: Path, images: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = CAFe.from_pretrained(small_dir, device="cpu")
    with caplog.at_level(logging.WARNING, "cafe"):
        model.encode([WORDS], think=4)
        assert not caplog.messages  # words are not thought about
        for _ in range(2):
            model.encode(images, think=["a cat"] * 3)
    assert caplog.messages == [f"think: {UNTRAINED}"]
    assert checked_think(model, True) == CAPTION_TOKENS


@pytest.mark.parametrize("value", ["64", -1, 1.5, True, [3]])
def test_a_directory_that_says_nonsense_is_refused(small_dir: Path, value: Any) -> None:
    model = CAFe.from_pretrained(small_dir, device="cpu")
    setattr(model.model.config, TRAINED_THOUGHTS_KEY, value)
    with pytest.raises(CheckpointError, match=r"config\.json: trained_thought_tokens is"):
        model.encode([noise(0, 20, 20)], think=["a cat"])


# ------------------------------------------------------------------ files and indexes


def test_an_index_keeps_thoughts_and_is_followed_and_searched_with_them(
    model: CAFe, images: list[Any], folder: Path, tmp_path: Path
) -> None:
    to = tmp_path / "photos.index"
    report = build_index("tiny", folder, to, think=9)
    assert (report.rows, report.changes.added, report.changes.silent) == (3, 3, 0)
    thoughts = model.write_captions(images, max_new_tokens=9)
    expected = model.encode(images, think=thoughts)
    index = Index.open(to)
    assert (index.model.think, index.model.caption, index.model.writer) == (9, None, None)
    stored = index.stored([f"{i}.png" for i in range(3)])
    for number in range(3):
        row = stored[f"{number}.png"]
        assert row.generated_caption == thoughts[number]
        np.testing.assert_allclose(row.vector, expected[number], atol=EXACT)

    # What moved keeps its thought; what is new gets one, without being asked for again.
    (folder / "0.png").rename(folder / "moved.png")
    noise(7, 60, 50).save(folder / "new.png")
    changes = build_index("tiny", folder, to).changes
    assert (changes.added, changes.moved, changes.unchanged, changes.deleted) == (1, 1, 2, 1)
    searcher = Searcher.open(to)
    assert searcher.think == 9
    hits = {hit.id: hit for hit in searcher.search(images[1])}
    assert hits["1.png"].score == pytest.approx(1, abs=1e-5)
    assert hits["moved.png"].hit.metadata["generated_caption"] == thoughts[0]
    assert all(hit.hit.metadata["generated_caption"] for hit in hits.values())
    plain = {hit.id: hit for hit in searcher.search(images[1], think=0)}
    assert plain["1.png"].score < 0.9999
    (words,) = searcher.search(WORDS, 1)
    assert words.score == pytest.approx(
        max(v @ model.encode(WORDS) for v in index_vectors(to)), abs=1e-5
    )

    for options, problem in [
        ({"think": 0}, "was made with thoughts of at most 9 tokens; index .* without captions"),
        ({"think": 10}, "index .* with thoughts of at most 10 tokens into another one"),
        ({"caption": True}, "index .* with captions into another one"),
        ({"caption": True, "think": 9}, "caption and think are two ways"),
        ({"think": -1}, "think=-1: give the largest number"),
    ]:
        with pytest.raises(DataError, match=problem):
            build_index("tiny", folder, to, **options)


def index_vectors(uri: Path) -> list[np.ndarray]:
    index = Index.open(uri)
    return [one.vector for one in index.stored(index.known()).values()]


def test_an_index_without_thoughts_stays_without(folder: Path, tmp_path: Path) -> None:
    to = tmp_path / "plain.index"
    build_index("tiny", folder, to)
    with pytest.raises(DataError, match=r"was made without captions; index .* with thoughts"):
        build_index("tiny", folder, to, think=9)


def test_images_about_which_nothing_is_said_are_embedded_plainly_and_counted(
    small_dir: Path, folder: Path, images: list[Any], tmp_path: Path
) -> None:
    silent = CAFe.from_pretrained(small_dir)
    report = build_index(small_dir, folder, tmp_path / "a.index", think=9)
    assert (report.changes.added, report.changes.silent) == (3, 3)
    np.testing.assert_allclose(
        index_vectors(tmp_path / "a.index"), silent.encode(images), atol=EXACT
    )
    embedded = embed_dataset(small_dir, folder, think=9)
    assert embedded.silent == 3
    assert embed_dataset(small_dir, folder).silent == 0


def test_another_model_may_write_the_thoughts_and_then_must_go_on_to(
    small_dir: Path,
    model: CAFe,
    folder: Path,
    images: list[Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    to = tmp_path / "a.index"
    report = build_index(small_dir, folder, to, think=9, writer=model)
    assert report.changes.silent == 0
    reader = CAFe.from_pretrained(small_dir)
    thoughts = model.write_captions(images, max_new_tokens=9)
    np.testing.assert_allclose(index_vectors(to), reader.encode(images, think=thoughts), atol=EXACT)
    assert Index.open(to).model.writer == "tiny"
    assert build_index(small_dir, folder, to, writer="tiny").changes.unchanged == 3
    with pytest.raises(DataError, match=r"thoughts that tiny wrote, and .* would write others"):
        build_index(small_dir, folder, to)
    searcher = Searcher.open(to)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cafe"):
        searcher.search(WORDS)
        assert not caplog.messages
        searcher.search(images[0])
        searcher.search(images[1])
    (message,) = caplog.messages
    assert "tiny wrote the captions or thoughts" in message


def test_embed_writes_thoughts_beside_the_vectors(
    model: CAFe, images: list[Any], folder: Path, tmp_path: Path
) -> None:
    thoughts = model.write_captions(images, max_new_tokens=9)
    expected = model.encode(images, think=thoughts)
    one, shards, table = tmp_path / "one.parquet", tmp_path / "shards", tmp_path / "table"
    embed_dataset("tiny", folder, one, think=9)
    embed_dataset("tiny", folder, shards, shard_size=2, think=9)
    for path in (one, shards):
        read = pq.read_table(sorted(path.glob("*.parquet")) if path.is_dir() else path)
        assert read["generated_caption"].to_pylist() == thoughts
        vectors = np.array(read["embedding"].to_pylist(), np.float32)
        np.testing.assert_allclose(vectors, expected, atol=EXACT)
    assert json.loads((shards / "shards.json").read_text())["model"]["think"] == 9
    with pytest.raises(DataError, match="another model"):
        embed_dataset("tiny", folder, shards, shard_size=2, caption=True)
    embed_dataset("tiny", folder, to=table, think=9)
    stored = Index.open(table).stored([f"{i}.png" for i in range(3)])
    assert [stored[f"{i}.png"].generated_caption for i in range(3)] == thoughts
    own: list[Any] = []

    def encode(values: Any, think: Any = None) -> np.ndarray:
        own.append(think)
        return model.encode(values, think=think)

    report = embed_dataset(model, folder, think=9, encode=encode)
    assert own == [thoughts]
    np.testing.assert_allclose(report.embeddings, expected, atol=EXACT)
