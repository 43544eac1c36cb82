"""`cafe export --cross-encoder` writes what sentence-transformers' class scores as cafe does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import cafe.release.cross_encoder as module
from cafe.errors import CheckpointError
from cafe.model.checkpoint.sentence_transformers_files import is_cross_encoder
from cafe.model.judging import judge, log_odds, yes_no_tokens
from cafe.model.rerank import ANSWER_TOKENS_KEY
from cafe.model.vlm import CAFe
from cafe.release.cross_encoder import (
    export_cross_encoder,
    probe_pairs,
    verify_cross_encoder,
)
from cafe.release.verify import verify
from helpers import builders

STATEMENTS = ["a big red cat", 'it says "yes"', "no cat at the top left, and no small one"]


@pytest.fixture
def run(command_line: Any) -> Any:
    return command_line


@pytest.fixture(scope="module")
def written(babbling_model: CAFe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cross")
    babbling_model.save_pretrained(folder / "model")
    export_cross_encoder(folder / "model", folder / "reranker")
    return folder / "reranker"


def images() -> list[PIL.Image.Image]:
    rng = np.random.default_rng(3)
    sizes = [(64, 64), (120, 48), (48, 200)]
    return [PIL.Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def stock(directory: Path) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(directory), device="cpu", model_kwargs={"dtype": torch.float32})


def odds(encoder: Any, pairs: list[Any], **options: Any) -> np.ndarray:
    return encoder.predict(pairs, activation_fn=torch.nn.Identity(), **options)


def test_the_stock_class_scores_pairs_as_cafe_does(written: Path) -> None:
    theirs, ours = stock(written), CAFe.from_pretrained(written, dtype=torch.float32)
    names = [type(part).__name__ for part in theirs]
    assert names == ["Transformer", "LogitScore"]
    for image in images():
        want = judge(ours, image, STATEMENTS, 8, "question").numpy()
        assert np.ptp(want) > 1e-2, "the statements must be told apart"
        for size in (1, 3):
            found = odds(theirs, [(image, text) for text in STATEMENTS], batch_size=size)
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
        swapped = odds(theirs, [(text, image) for text in STATEMENTS])
        np.testing.assert_allclose(swapped, want, rtol=0, atol=1e-5)
        probability = theirs.predict([(image, text) for text in STATEMENTS])
        np.testing.assert_allclose(probability, ours.score(image, STATEMENTS), rtol=0, atol=1e-5)
        np.testing.assert_allclose(probability, ours.rerank(image, STATEMENTS).match, atol=1e-5)
    ranked = theirs.rank(images()[0], STATEMENTS)
    assert [hit["corpus_id"] for hit in ranked] == np.argsort(
        -ours.score(images()[0], STATEMENTS)
    ).tolist()


def test_of_two_texts_the_first_stands_for_the_image(written: Path) -> None:
    pairs = [pair for pair in probe_pairs() if all(isinstance(side, str) for side in pair.sides)]
    assert len(pairs) == 2
    ours = CAFe.from_pretrained(written, dtype=torch.float32)
    want = log_odds(ours, [pair.question for pair in pairs], 8).numpy()
    found = odds(stock(written), [pair.sides for pair in pairs])
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


def test_a_pair_that_is_no_match_question_is_an_error_and_no_score(written: Path) -> None:
    theirs, (a, b, _) = stock(written), images()
    for pair in ((a, b), ({"image": a, "text": "a cat"}, "a dog"), (a, "")):
        with pytest.raises(Exception, match="a pair is one image and a text"):
            odds(theirs, [pair])


def test_two_tokens_are_read_by_every_tool_and_named_for_vllm(
    written: Path, babbling_model: CAFe
) -> None:
    config = json.loads((written / "config.json").read_text())
    no, yes = config[ANSWER_TOKENS_KEY]
    assert config["method"] == "from_2_way_softmax"
    ours = CAFe.from_pretrained(written)
    ids = ours.processor.tokenizer.convert_tokens_to_ids([yes, no])
    assert yes_no_tokens(ours) == ([ids[0]], [ids[1]])
    score = json.loads((written / "1_LogitScore/config.json").read_text())
    assert score == {"true_token_id": ids[0], "false_token_id": ids[1]}
    every = yes_no_tokens(babbling_model)
    assert len(every[0]) > 1, "there are other spellings"
    assert [ids[0] in every[0], ids[1] in every[1]] == [True, True]
    assert not (written / "1_Pooling").exists()


def test_the_likelier_spelling_is_chosen(babbling_model: CAFe, tmp_path: Path) -> None:
    core, tokenizer = babbling_model, babbling_model.processor.tokenizer
    before = core.lm_head.weight.detach().clone()
    chosen = set()
    for spelling in (("no", "yes"), (" no", " yes")):
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in spelling]
        with torch.no_grad():
            core.lm_head.weight[ids] *= 30  # of one sign for about half of the states
        core.save_pretrained(tmp_path / spelling[0])
        report = export_cross_encoder(tmp_path / spelling[0], tmp_path / f"{spelling[0]} out")
        assert tokenizer.convert_tokens_to_ids(list(report.tokens)) == ids
        chosen.add(report.tokens)
        with torch.no_grad():
            core.lm_head.weight.copy_(before)
    assert len(chosen) == 2


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "internvl", "llava_next"])
def test_families(name: str, tmp_path: Path) -> None:
    builders.build(name, tmp_path / "model")
    report = export_cross_encoder(tmp_path / "model", tmp_path / "reranker", verify=True)
    assert report.difference is not None
    assert report.difference < 1e-5
    model = CAFe.from_pretrained(tmp_path / "reranker", dtype=torch.float32)
    scores = log_odds(model, [pair.question for pair in probe_pairs()], 8)
    assert scores.std() > 1e-3, "the pairs must be told apart"


def test_a_difference_is_found(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify_cross_encoder(written).difference < 1e-5  # type: ignore[operator]
    real = module.log_odds
    monkeypatch.setattr(module, "log_odds", lambda *given: real(*given).flip(0))
    with pytest.raises(CheckpointError, match="from cafe's"):
        verify_cross_encoder(written)


def test_the_command(run: Any, small_dir: Path, tmp_path: Path) -> None:
    out_dir, reranker = tmp_path / "out", tmp_path / "reranker"
    code, out, err = run("export", small_dir, "--to", out_dir, "--cross-encoder", reranker)
    assert (code, err) == (0, "")
    assert "embeddings of 7 probes" in out.splitlines()[0]
    assert "from those of all spellings (8 pairs)" in out.splitlines()[1]
    assert [is_cross_encoder(folder) for folder in (out_dir, reranker)] == [False, True]
    code, out, _ = run("export", reranker, "--verify")
    assert code == 0
    assert "; CrossEncoder at most " in out
    for arguments, told in (
        ((small_dir, "--cross-encoder", reranker), "already exists"),
        ((small_dir, "--cross-encoder", tmp_path / "new", "--merge"), "--to DIR"),
        ((small_dir,), "--to DIR"),
    ):
        code, _, err = run("export", *arguments)
        assert (code, told in err) == (2, True), err
    with pytest.raises(CheckpointError, match="is not a cross-encoder"):
        verify_cross_encoder(small_dir)
    with pytest.raises(CheckpointError, match="is a cross-encoder"):
        verify(reranker)


@pytest.mark.parametrize("value", [["no"], "no yes", ["no", "no"], ["no", "nowhere"], [1, 2]])
def test_broken_answer_tokens_are_one_line(written: Path, tmp_path: Path, value: Any) -> None:
    import shutil

    shutil.copytree(written, tmp_path / "broken")
    file = tmp_path / "broken" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), ANSWER_TOKENS_KEY: value}))
    with pytest.raises(CheckpointError, match=ANSWER_TOKENS_KEY):
        CAFe.from_pretrained(tmp_path / "broken").score(images()[0], ["a cat"])
