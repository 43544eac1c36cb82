"""Indexes of token vectors: LanceDB's MaxSim is ours, and dense and late are never mixed up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cafe.cli import app
from cafe.errors import CheckpointError, DataError
from cafe.index import Index, IndexRow, ModelFacts
from cafe.model.multi_vector import add_token_projection, new_token_projection
from cafe.model.vlm import CAFe
from cafe.retrieval.indexing import build_index, model_facts
from cafe.retrieval.search import Searcher
from cafe.serving.model_calls import CafeCalls
from cafe.serving.routes.search import IndexSearch
from cafe.serving.run import Server, ServerSettings
from helpers.fakes import request, wait_until
from helpers.images import noise
from helpers.models import build_small_model, with_token_vectors

COUNT = 7


@pytest.fixture(scope="module")
def late_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("late")
    with_token_vectors(build_small_model()).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def late(late_dir: Path) -> CAFe:
    return CAFe.from_pretrained(late_dir, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(COUNT):
        noise(i, 60 + 9 * i, 50).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def index(late_dir: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("index") / "i")
    build_index(late_dir, photos, uri, multi_vector=1.0, batch_size=3)
    return uri


QUERIES = ["a red cat", "yes no", "the top left of it"]


@pytest.mark.parametrize("query", QUERIES)
def test_a_search_is_max_sim(index: str, late: CAFe, photos: Path, query: str) -> None:
    searcher = Searcher.open(index, late)
    hits = searcher.search(query, top=COUNT)
    images = late.encode_tokens([photos / f"{i}.png" for i in range(COUNT)])
    scores = late.max_sim(late.encode_tokens(query), images)[0]
    order = np.argsort(-scores)
    assert [hit.id for hit in hits] == [f"{i}.png" for i in order]
    np.testing.assert_allclose([hit.score for hit in hits], scores[order], atol=1e-5)
    filtered = searcher.search(query, top=2, where="id != '0.png'")
    assert [h.id for h in filtered] == [f"{i}.png" for i in order if i != 0][:2]
    dense = searcher.search(query, top=COUNT, multi_vector=False)
    cosines = late.encode(query) @ late.encode([photos / h.id for h in dense]).T
    np.testing.assert_allclose([hit.score for hit in dense], cosines, atol=1e-5)


def test_an_image_is_its_own_nearest_even_when_pooled(
    late_dir: Path, late: CAFe, photos: Path, tmp_path: Path
) -> None:
    build_index(late_dir, photos, tmp_path / "i", multi_vector=4.0)
    facts = Index.open(tmp_path / "i").model
    assert (facts.pool, facts.token_dimension) == (4.0, 16)
    searcher = Searcher.open(tmp_path / "i", late)
    for i in (0, 5):
        assert searcher.search(photos / f"{i}.png")[0].id == f"{i}.png"
    stored = Index.open(tmp_path / "i").stored(["5.png"])["5.png"].tokens
    expected = late.encode_tokens(photos / "5.png", pool=4)[0]
    assert stored is not None
    np.testing.assert_allclose(stored, expected, atol=1e-6)
    assert len(stored) == len(late.encode_tokens(photos / "5.png")[0]) // 4


def test_an_index_is_followed_and_keeps_vectors_of_what_moved(
    late_dir: Path, late: CAFe, tmp_path: Path
) -> None:
    folder, uri = tmp_path / "photos", tmp_path / "i"
    folder.mkdir()
    for i in range(3):
        noise(i, 60, 50).save(folder / f"{i}.png")
    build_index(late_dir, folder, uri, multi_vector=2.0)
    (folder / "0.png").rename(folder / "new.png")
    noise(9, 80, 50).save(folder / "1.png")
    changes = build_index(late_dir, folder, uri).changes  # as it was made
    assert (changes.moved, changes.changed, changes.unchanged) == (1, 1, 1)
    stored = Index.open(uri).stored(["new.png", "1.png", "2.png"])
    for name, one in stored.items():
        expected = late.encode_tokens(folder / name, pool=2)[0]
        assert one.tokens is not None
        np.testing.assert_allclose(one.tokens, expected, atol=1e-5)


def test_reranking_takes_cosines_of_embeddings(index: str, late: CAFe, photos: Path) -> None:
    searcher = Searcher.open(index, late)
    hits = searcher.search("a red cat", top=3)
    found = searcher.rerank("a red cat", hits)
    expected = late.rerank("a red cat", [photos / hit.id for hit in hits])
    by_id = {hit.id: p for hit, p in zip(hits, expected.posterior, strict=True)}
    assert [hit.posterior for hit in found] == pytest.approx([by_id[h.id] for h in found], abs=1e-5)


def test_a_hybrid_search_scores_every_hit_by_token_vectors(late: CAFe, tmp_path: Path) -> None:
    texts = [f"{colour} mug" for colour in ("red", "green", "blue", "grey")]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    uri = tmp_path / "i"
    build_index(late, tmp_path / "texts.jsonl", uri, multi_vector=1.0)
    searcher = Searcher.open(uri, late)
    plain = searcher.search("the blue one", top=4)
    hybrid = searcher.search("the blue one", top=4, hybrid=True)
    assert {hit.hit.metadata["text"] for hit in hybrid} == {*texts}
    scores = {hit.id: hit.score for hit in plain}
    assert {hit.id: hit.score for hit in hybrid} == pytest.approx(scores, abs=1e-5)


# ---------------------------------------------------------------------- dense and late


def test_token_vectors_are_not_searched_in_a_dense_index(
    late_dir: Path, late: CAFe, photos: Path, tmp_path: Path
) -> None:
    uri = tmp_path / "dense"
    build_index(late_dir, photos, uri)
    facts = Index.open(uri).model
    assert (facts.tokens, facts.token_dimension, facts.pool) == (None, None, None)
    searcher = Searcher.open(uri, late)
    with pytest.raises(DataError, match="no token vectors; search it without multi_vector"):
        searcher.search("a", multi_vector=True)
    with pytest.raises(DataError, match=r"shape \(\d+, 16\).*holds one vector of each item"):
        searcher.search(late.encode_tokens("a")[0])
    with pytest.raises(DataError, match="made without token vectors, not with one for 3"):
        build_index(late_dir, photos, uri, multi_vector=3.0)


def test_what_an_index_of_token_vectors_refuses(
    index: str, late_dir: Path, late: CAFe, photos: Path, small_dir: Path, tmp_path: Path
) -> None:
    searcher = Searcher.open(index, late)
    with pytest.raises(DataError, match=r"shape \(2, 8\), expected \(n, 16\)"):
        searcher.search(np.eye(8)[:2])
    with pytest.raises(DataError, match="not of length one"):
        searcher.search(np.ones((2, 16)))
    for words in ({"caption": True}, {"think": 8}):
        with pytest.raises(DataError, match="changes an embedding only; leave it out"):
            searcher.search("a", **words)
    with pytest.raises(DataError, match="with one vector for 1 tokens, not with one for 3"):
        build_index(late_dir, photos, index, multi_vector=3.0)
    with pytest.raises(CheckpointError, match="no token vectors"):
        build_index(small_dir, photos, tmp_path / "new", multi_vector=1.0)
    assert not (tmp_path / "new").exists()
    with pytest.raises(DataError, match="0 rows with token vectors, and 1 rows to add"):
        Index.open(index).add([IndexRow("x", "text", text="x")], np.ones((1, 64)))


def test_another_projection_on_the_same_weights_is_noticed(
    index: str, late_dir: Path, tmp_path: Path
) -> None:
    other = CAFe.from_pretrained(late_dir, device="cpu")
    add_token_projection(other.model, new_token_projection(64, 16))
    other.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="another projection of token vectors"):
        Searcher.open(index, tmp_path)
    dense = model_facts(CAFe.from_pretrained(tmp_path, device="cpu"))
    assert dense.weights == Index.open(index).model.weights


def test_a_model_in_another_type_is_the_same(index: str, late_dir: Path) -> None:
    half = CAFe.from_pretrained(late_dir, device="cpu", dtype=torch.bfloat16)
    assert len(Searcher.open(index, half).search("a red cat")) == COUNT


def test_facts_that_earlier_versions_wrote_are_read() -> None:
    facts = ModelFacts("a", "b", "c", 3)
    assert set(json.loads(facts.to_json())) == {"name", "weights", "prompt", "dimension"}
    assert ModelFacts.from_json(facts.to_json()) == facts


def test_the_command_line(late_dir: Path, photos: Path, tmp_path: Path) -> None:
    def run(*arguments: Any) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    uri = tmp_path / "i"
    run("index", late_dir, photos, "--to", uri, "--multi-vector", "--pool", 2)
    hits = json.loads(run("search", uri, "a red cat", "--json"))["hits"]
    expected = Searcher.open(uri).search("a red cat")
    assert [hit["id"] for hit in hits] == [hit.id for hit in expected]
    assert "tokens" not in hits[0]
    refused = CliRunner().invoke(app, ["index", "x", "y", "--to", "z", "--pool", "2"])
    assert refused.exit_code == 2


@pytest.mark.parametrize("bad", [0, -1, 0.5, float("nan"), float("inf")])
def test_a_pool_that_cannot_be_leaves_no_index(
    late: CAFe, photos: Path, tmp_path: Path, bad: float
) -> None:
    with pytest.raises(DataError, match=r"multi_vector=.*: give for how many tokens"):
        build_index(late, photos, tmp_path / "i", multi_vector=bad)
    assert Index.find(tmp_path / "i") is None


@pytest.mark.parametrize("bad", [-1, True, 0.5, float("nan"), "3"])
def test_a_thought_of_no_number_of_tokens_leaves_no_index(
    late: CAFe, photos: Path, tmp_path: Path, bad: Any
) -> None:
    with pytest.raises(DataError, match=r"think=.*: give the largest number of tokens"):
        build_index(late, photos, tmp_path / "i", think=bad)
    assert Index.find(tmp_path / "i") is None


@pytest.mark.parametrize("query", QUERIES)
def test_the_server_searches_as_the_command_line_does(index: str, late: CAFe, query: str) -> None:
    search = IndexSearch(Index.open(index))
    server = Server(
        lambda: CafeCalls(late), ServerSettings(name="late", port=0, page=False), search
    )
    server.start()
    try:
        wait_until(lambda: server.engine.loaded)
        status, reply, _ = request(server, "/search", {"query": query, "top": COUNT})
        want = Searcher.open(index, late).search(query, top=COUNT)
        assert status == 200
        assert [hit["id"] for hit in reply["hits"]] == [hit.id for hit in want]
        scores = [hit["score"] for hit in reply["hits"]]
        np.testing.assert_allclose(scores, [hit.score for hit in want], atol=1e-5)
        dense = Searcher.open(index, late).search(query, top=COUNT, multi_vector=False)
        assert abs(dense[0].score - want[0].score) > 1e-3, "both alike shows nothing"
        for words in ({"caption": True}, {"think": 8}):
            status, reply, _ = request(server, "/search", {"query": query, **words})
            assert status == 400
            assert "changes an embedding only" in reply["error"]["message"]
    finally:
        server.stop()
