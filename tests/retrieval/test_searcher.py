"""`Searcher` on the small model: from an index to hits, judged and answered from."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlavaOnevisionConfig

from cafe.errors import DataError
from cafe.index import Index, Origin
from cafe.model import judging
from cafe.model.tiny import IMAGE_PIXELS, ONE_IMAGE_KEY
from cafe.model.vlm import CAFe
from cafe.retrieval.indexing import build_index
from cafe.retrieval.search import ONE_IMAGE, RankedHit, Searcher, knows_one_image
from cafe.types import Hit
from helpers.images import noise

COUNT = 6


def save_noise(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    noise(seed, 60 + seed, 50).save(path)


def never(name: str) -> CAFe:
    raise AssertionError(f"{name} was loaded")


@pytest.fixture(scope="module")
def model(small_dir: Path) -> CAFe:
    return CAFe.from_pretrained(small_dir)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with columns; tests only read it."""
    folder = tmp_path_factory.mktemp("indexed") / "photos"
    lines = []
    for i in range(COUNT):
        save_noise(folder / f"{i}.png", i)
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"cat {i}", "year": 2000 + i}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def index(photos: Path, model: CAFe) -> Index:
    build_index(model, photos, photos.parent / "i")
    return Index.open(photos.parent / "i")


@pytest.fixture
def searcher(index: Index, model: CAFe) -> Searcher:
    return Searcher.open(index, model)


def ids(hits: Sequence[RankedHit]) -> list[str]:
    return [hit.id for hit in hits]


# ---------------------------------------------------------------------- opening


def test_the_model_that_made_the_index_is_loaded_by_default(
    index: Index, model: CAFe, small_dir: Path
) -> None:
    asked: list[str] = []

    def load(name: str) -> CAFe:
        asked.append(name)
        return model

    searcher = Searcher.open(index.uri, load=load)
    assert (asked, searcher.model) == ([str(small_dir)], model)


def test_another_model_is_refused_before_it_loads(
    index: Index, small_dir: Path, tmp_path: Path
) -> None:
    other = CAFe.from_pretrained(small_dir)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="has other weights"):
        Searcher.open(index, tmp_path / "other", load=never)
    with pytest.raises(DataError, match="has other weights"):
        Searcher.open(index, CAFe.from_pretrained(tmp_path / "other"))


def test_a_copy_of_the_model_may_search(
    searcher: Searcher, index: Index, small_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_dir, tmp_path / "copy")
    copied = Searcher.open(index, tmp_path / "copy")
    assert copied.search("a cat") == searcher.search("a cat")


def test_no_index_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="make one: cafe index MODEL FOLDER --to"):
        Searcher.open(tmp_path / "none", load=never)


def test_a_searcher_without_a_model_takes_vectors_only(
    index: Index, searcher: Searcher, model: CAFe
) -> None:
    blind = Searcher(index)
    hits = blind.search(model.encode("a cat"))
    assert hits == searcher.search("a cat")
    for needs_model in (
        lambda: blind.search("a cat"),
        lambda: blind.rerank("a cat", hits),
        lambda: blind.answer("What?", hits),
    ):
        with pytest.raises(DataError, match="was opened without a model"):
            needs_model()


def test_a_search_by_vectors_needs_no_torch() -> None:
    code = "import sys; import cafe.retrieval.search; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------------- hits


def test_hits_are_those_of_the_models_own_cosines(
    searcher: Searcher, model: CAFe, photos: Path
) -> None:
    images = model.encode([photos / f"{i}.png" for i in range(COUNT)])
    for query in (
        "a big cat",
        photos / "3.png",
        {"text": "a big cat", "image": photos / "3.png"},
    ):
        scores = images @ model.encode(query)
        hits = searcher.search(query, 4)
        best = np.argsort(-scores)[:4]
        assert ids(hits) == [f"{i}.png" for i in best]
        np.testing.assert_allclose([hit.score for hit in hits], scores[best], atol=1e-5)
        assert hits[0].file == str(photos / hits[0].id)
    assert ids(searcher.search(photos / "3.png", top=1)) == ["3.png"]


def test_sql_chooses_rows_and_bad_sql_is_refused(searcher: Searcher) -> None:
    assert ids(searcher.search("a cat", where="year = 2003")) == ["3.png"]
    assert searcher.search("a cat", where="year = 1900") == []
    searcher.check_filter("year = 2003")
    for refused in (searcher.check_filter, lambda sql: searcher.search("a cat", where=sql)):
        with pytest.raises(DataError, match="compare the columns id, kind, path, text"):
            refused("nope = 1")


def test_no_hit_leads_out_of_the_indexed_folder(tmp_path: Path) -> None:
    """An untrusted index may contain any path; the links in the folder are its owner's."""
    root = tmp_path / "photos"
    save_noise(root / "1.png", 1)
    save_noise(tmp_path / "secret.png", 2)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(root)

    def file(root: Path, name: str) -> str | None:
        hit = Hit("id", 0.5, {"kind": "image", "path": name})
        index: Any = SimpleNamespace(
            origin=Origin(str(root), str(root)), search=lambda *arguments, **options: [hit]
        )
        (found,) = Searcher(index).search(np.ones(2))
        return found.file

    for folder in (root, tmp_path / "linked"):
        assert file(folder, "1.png") == str(folder / "1.png")
        for name in ("../secret.png", str(tmp_path / "secret.png"), "up/../secret.png"):
            assert file(folder, name) is None, name
        for name in ("link.png", "up/secret.png"):
            assert file(folder, name) == str(folder / name)
    assert file(root, "a\0b") is None


# ---------------------------------------------------------------------- reranking


def test_reranking_orders_the_best_by_cosine_and_judgement_together(
    searcher: Searcher, model: CAFe, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The small model answers nearly alike, and as its embeddings say: let them disagree.
    odds = judging.log_odds
    monkeypatch.setattr(judging, "log_odds", lambda *a: 20 * (odds(*a).mean() - odds(*a)))
    plain = searcher.search("a cat", COUNT)
    judged = searcher.rerank("a cat", plain, 4)
    four = ids(plain[:4])
    matches = dict(zip(four, model.score("a cat", [photos / id for id in four]), strict=True))
    cosines = {hit.id: hit.score for hit in plain}
    weights = {
        id: math.exp(20 * (cosines[id] - plain[0].score)) * matches[id] / (1 - matches[id])
        for id in four
    }
    order = ids(judged[:4])
    assert order == sorted(four, key=lambda id: -weights[id])
    assert order not in (four, sorted(four, key=lambda id: -matches[id])), "both count"
    for hit in judged[:4]:
        assert hit.match == pytest.approx(matches[hit.id], abs=1e-5)
        share = weights[hit.id] / sum(weights.values())
        assert hit.posterior == pytest.approx(share, rel=1e-3)
    assert judged[4:] == plain[4:]
    everything = searcher.rerank("a cat", plain)
    assert all(hit.posterior is not None for hit in everything)
    assert {*ids(everything)} == {*ids(plain)}
    assert searcher.rerank("a cat", []) == []
    both = {"text": "a cat", "image": photos / "1.png"}
    assert searcher.rerank(both, plain, 4) == judged, "of a text with an image, the text"


def test_hits_are_ordered_by_the_likelihood_of_the_query_as_their_caption(
    searcher: Searcher, model: CAFe, photos: Path
) -> None:
    plain = searcher.search("a cat", COUNT)
    judged = searcher.rerank("a cat", plain, 4, by="likelihood")
    images = [photos / hit.id for hit in plain[:4]]
    cosines = np.array([hit.score for hit in plain[:4]])
    want = model.rerank("a cat", images, cosines, by="likelihood")
    assert ids(judged[:4]) == [plain[i].id for i in np.argsort(-want.posterior)]
    of = dict(zip(ids(plain[:4]), want.log_likelihood, strict=True))
    for hit in judged[:4]:
        assert hit.log_likelihood == pytest.approx(of[hit.id], abs=1e-4)
        assert hit.match is None
    assert judged[4:] == plain[4:]


def test_reranking_images_by_an_image_is_a_clear_error(searcher: Searcher, photos: Path) -> None:
    hits = searcher.search(photos / "1.png")
    with pytest.raises(DataError, match="a text with images, or an image with texts"):
        searcher.rerank(photos / "1.png", hits, 3)


def test_an_image_that_is_gone_is_named(model: CAFe, tmp_path: Path) -> None:
    for i in range(2):
        save_noise(tmp_path / "photos" / f"{i}.png", i)
    build_index(model, tmp_path / "photos", tmp_path / "i")
    shutil.rmtree(tmp_path / "photos")
    searcher = Searcher.open(tmp_path / "i", model)
    hits = searcher.search("a cat")
    assert len(hits) == 2
    with pytest.raises(DataError, match="is gone; update the index"):
        searcher.rerank("a cat", hits)


# ---------------------------------------------------------------------- answers


class Answering:
    """A model that says `reply`, and remembers what it was shown."""

    def __init__(self, reply: str, *, one_image: bool = False) -> None:
        self.reply = reply
        self.asked: list[Any] = []
        self.model = SimpleNamespace(config=SimpleNamespace(**{ONE_IMAGE_KEY: one_image}))

    def generate(self, conversation: Any) -> str:
        self.asked.append(conversation)
        return self.reply


def answering(index: Index, model: Answering) -> Searcher:
    stand_in: Any = model
    return Searcher(index, stand_in)


def test_an_answer_of_tiny_is_about_the_best_hit_and_says_so(
    searcher: Searcher, model: CAFe, photos: Path
) -> None:
    hits = searcher.search("What is this?", 3)
    said = searcher.answer("What is this?", hits)
    alone = model.generate({"text": "What is this?", "image": photos / hits[0].id})
    assert (said.text, said.sources, said.note) == (f"{alone} [1]", [1], ONE_IMAGE)
    with pytest.raises(DataError, match="no hits to answer from"):
        searcher.answer("What is this?", [])


def test_other_models_see_all_hits_as_numbered_images(index: Index, searcher: Searcher) -> None:
    hits = searcher.search("Cats?", 3)
    model = Answering("Cats [2], and [3] [3], not [9].")
    said = answering(index, model).answer("Cats?", hits)
    (conversation,) = model.asked
    parts = conversation[0].content
    assert [parts[0], parts[3], parts[6]] == ["Image [1]: ", "Image [2]: ", "Image [3]: "]
    assert [str(parts[i].source) for i in (1, 4, 7)] == [hit.file for hit in hits]
    assert parts[-1].startswith("Cats?\n")
    assert (said.text, said.sources, said.note) == (model.reply, [2, 3], None)
    silent = answering(index, Answering("Cats.")).answer("Cats?", hits)
    assert silent.sources == [1, 2, 3]
    assert silent.note == "the answer names no source; these are what the model was given"


def test_the_model_itself_can_read_the_prompt_of_several_images(
    index: Index, small_dir: Path, tmp_path: Path
) -> None:
    """Without the key in its configuration; what the small model says of it means nothing."""
    copy = shutil.copytree(small_dir, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    assert config.pop(ONE_IMAGE_KEY) is True
    (copy / "config.json").write_text(json.dumps(config))
    searcher = Searcher.open(index, copy)
    said = searcher.answer("Cats?", searcher.search("Cats?", 3))
    assert len(said.sources) >= 1
    assert said.note != ONE_IMAGE


def test_a_model_answers_from_one_image_because_its_configuration_says_so(tmp_path: Path) -> None:
    def knows_one(config: Any) -> bool:
        vlm: Any = SimpleNamespace(model=SimpleNamespace(config=config))
        return knows_one_image(vlm)

    real: Any = LlavaOnevisionConfig(vision_config={"image_size": IMAGE_PIXELS})
    assert real.text_config.hidden_size > 1000
    assert not knows_one(real), "the size of its images says nothing"
    for value, expected in ((True, True), (False, False), ("false", False)):
        setattr(real, ONE_IMAGE_KEY, value)
        real.save_pretrained(tmp_path)
        assert knows_one(AutoConfig.from_pretrained(tmp_path)) is expected


def test_what_grows_from_tiny_keeps_saying_that_it_answers_from_one_image(
    tmp_path: Path, small_model: CAFe
) -> None:
    tiny = CAFe.from_pretrained("tiny")
    assert knows_one_image(tiny)
    tiny.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved[ONE_IMAGE_KEY] is True
    assert knows_one_image(CAFe.from_pretrained(tmp_path / "saved"))
    assert knows_one_image(small_model), "a new base, as the script builds it"
