"""Token vectors: what they are, what is stored, and that nothing else notices the projection."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from cafe.errors import CheckpointError
from cafe.model.multi_vector import add_token_projection, new_token_projection
from cafe.model.token_vectors import pooled
from cafe.model.vlm import CAFe
from cafe.release.release import export
from cafe.release.verify import verify
from helpers.models import build_small_model

RED = PIL.Image.new("RGB", (96, 96), "red")
NOISE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 140, 3), dtype=np.uint8))
INPUTS: list[Any] = [
    "a red cat",
    RED,
    {"image": NOISE, "text": "what is at the top left"},
    NOISE,
    "yes",
]
MESSAGES = [{"role": "user", "content": [{"type": "image", "image": NOISE}, "Is it a cat?"]}]


def with_projection(model: Any, dim: int = 16) -> Any:
    torch.manual_seed(3)
    add_token_projection(model.model, new_token_projection(64, dim))
    return model


@pytest.fixture(scope="module")
def bare_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bare")
    build_small_model().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def late_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("late")
    with_projection(build_small_model()).save_pretrained(directory)
    return directory


def files(directory: Path) -> dict[str, bytes]:
    found = (p for p in directory.rglob("*") if p.is_file())
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in found}


# ---------------------------------------------------------------------- encode


def test_there_is_a_vector_for_every_token_of_the_embedding_s_sequence(late_dir: Path) -> None:
    model = CAFe.from_pretrained(late_dir, device="cpu")
    found = model.encode_tokens(INPUTS)
    assert [v.dtype for v in found] == [np.float32] * 5
    for value, vectors in zip(INPUTS, found, strict=True):
        rows, vision = model.collator.embedding_rows([_one(value)])
        states = model(rows, vision)[0]
        assert len(states) == len(vectors)
        expected = torch.nn.functional.normalize(states @ model.model.token_projection.weight.T)
        np.testing.assert_allclose(vectors, expected.detach().numpy(), atol=1e-5)


def _one(value: Any) -> Any:
    from cafe.model.rows.inputs import as_conversation

    return as_conversation(value)


def test_batches_pooling_and_widths(late_dir: Path) -> None:
    model = CAFe.from_pretrained(late_dir, device="cpu")
    whole = model.encode_tokens(INPUTS)
    for a, b in zip(model.encode_tokens(INPUTS, batch_size=1), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(model.encode_tokens(INPUTS, truncate_dim=5), whole, strict=True):
        cut = b[:, :5] / np.linalg.norm(b[:, :5], axis=1, keepdims=True)
        np.testing.assert_allclose(a, cut, atol=1e-5)
    for a, b in zip(model.encode_tokens(INPUTS, pool=3), whole, strict=True):
        assert len(a) == len(b) // 3
        np.testing.assert_allclose(a, pooled(b, 3), atol=1e-6)
    assert len(model.encode_tokens("a red cat")) == 1
    assert model.encode_tokens([]) == []


@pytest.mark.parametrize("factor", [1, 1.5, 2, 3, 7, 1000])
def test_pooling_is_that_of_sentence_transformers(factor: float) -> None:
    from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

    rng = np.random.default_rng(5)
    for count in (1, 2, 9, 60):
        vectors = rng.normal(size=(count, 8)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        theirs = HierarchicalTokenPooling(factor, num_protected_tokens=0)
        expected = theirs.pool([torch.from_numpy(vectors)])[0].numpy()
        found = pooled(vectors, factor)
        # Theirs are in the order of the clusters' numbers.
        order = (found @ expected.T).argmax(axis=1)
        assert sorted(order.tolist()) == list(range(len(expected)))
        np.testing.assert_allclose(found, expected[order], atol=1e-5)


def test_equal_vectors_are_pooled_first() -> None:
    a, b = np.eye(4, dtype=np.float32)[:2]
    found = pooled(np.stack([a, b, a, a, b, a]), 3)
    np.testing.assert_allclose(found, np.stack([a, b]))


def test_scores_are_those_of_sentence_transformers(late_dir: Path) -> None:
    from sentence_transformers.util.similarity import mean_maxsim

    model = CAFe.from_pretrained(late_dir, device="cpu")
    vectors = model.encode_tokens(INPUTS)
    expected = mean_maxsim([torch.from_numpy(v) for v in vectors[:2]], vectors)
    np.testing.assert_allclose(CAFe.max_sim(vectors[:2], vectors), expected, atol=1e-6)
    nothing = np.zeros((0, 16), dtype=np.float32)
    with pytest.raises(ValueError, match="one of the documents has no vectors"):
        CAFe.max_sim(vectors, [nothing, *vectors])
    with pytest.raises(ValueError, match="one of the queries has no vectors"):
        CAFe.max_sim([nothing], vectors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": 0.5}, r"pool=0\.5"),
        ({"truncate_dim": 17}, "truncate_dim=17: use 1 to 16"),
        ({"truncate_dim": 0}, "truncate_dim=0"),
    ],
)
def test_options_that_make_no_sense(late_dir: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CAFe.from_pretrained(late_dir, device="cpu").encode_tokens("a", **options)


def test_a_model_without_a_projection_says_so(bare_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no token vectors: .*multi_vector_weight"):
        CAFe.from_pretrained(bare_dir, device="cpu").encode_tokens("a")


# ---------------------------------------------------------------------- the saved directory


def test_nothing_else_in_the_directory_is_changed_by_a_projection(
    bare_dir: Path, late_dir: Path
) -> None:
    bare, late = files(bare_dir), files(late_dir)
    assert {n: c for n, c in late.items() if not n.startswith("multi_vector/")} == bare
    assert sum(len(c) for n, c in late.items() if n.endswith(".safetensors")) < 1.02 * sum(
        len(c) for n, c in bare.items() if n.endswith(".safetensors")
    )


def test_embeddings_and_answers_are_the_same_to_the_bit(bare_dir: Path, late_dir: Path) -> None:
    bare, late = (CAFe.from_pretrained(d, device="cpu") for d in (bare_dir, late_dir))
    assert np.array_equal(bare.encode(INPUTS), late.encode(INPUTS))
    assert bare.generate(MESSAGES, max_new_tokens=8) == late.generate(MESSAGES, max_new_tokens=8)


def test_saving_and_loading_keeps_every_bit(late_dir: Path, tmp_path: Path) -> None:
    first = CAFe.from_pretrained(late_dir, device="cpu")
    first.save_pretrained(tmp_path / "copy")
    second = CAFe.from_pretrained(tmp_path / "copy", device="cpu")
    second.save_pretrained(tmp_path / "copy")  # over itself
    for other in (second, CAFe.from_pretrained(tmp_path / "copy", device="cpu")):
        for a, b in zip(first.encode_tokens(INPUTS), other.encode_tokens(INPUTS), strict=True):
            assert np.array_equal(a, b)
    assert files(late_dir).keys() == files(tmp_path / "copy").keys()


def test_a_directory_that_had_a_projection_has_none_after(late_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(late_dir, tmp_path / "copy")
    build_small_model().save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "multi_vector").exists()


def test_stock_sentence_transformers_gives_equal_vectors(late_dir: Path, tmp_path: Path) -> None:
    """Also where the directory has moved: nothing in it is absolute, and nothing a link."""
    from sentence_transformers import MultiVectorEncoder

    shutil.copytree(late_dir, tmp_path / "moved")
    theirs = MultiVectorEncoder(str(tmp_path / "moved" / "multi_vector"), device="cpu")
    ours = CAFe.from_pretrained(late_dir, device="cpu")
    assert theirs.similarity_fn_name == "meanmaxsim"
    expected = ours.encode_tokens(INPUTS)
    for encode in (theirs.encode_query, theirs.encode_document, theirs.encode):
        for value, vectors in zip(INPUTS, expected, strict=True):
            found = encode([value], convert_to_numpy=True)[0]
            np.testing.assert_allclose(found, vectors, atol=1e-5)
    scores = theirs.similarity(expected[:2], expected)
    np.testing.assert_allclose(ours.max_sim(expected[:2], expected), scores, atol=1e-6)


def test_stock_sentence_transformers_still_loads_the_dense_model(
    bare_dir: Path, late_dir: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    bare, late = (SentenceTransformer(str(d), device="cpu") for d in (bare_dir, late_dir))
    assert late.get_embedding_dimension() == 64
    for value in INPUTS:
        assert np.array_equal(bare.encode([value]), late.encode([value]))


def test_the_model_card_names_token_vectors(late_dir: Path, tmp_path: Path) -> None:
    report = export(late_dir, tmp_path / "late")
    card = (tmp_path / "late" / "README.md").read_text()
    assert report.tokens == 16
    assert "| token vectors | 16 numbers for every token" in card
    assert '`MultiVectorEncoder("late/multi_vector")`' in card
    build_small_model().save_pretrained(tmp_path / "without")
    assert export(tmp_path / "without", tmp_path / "plain").tokens == 0
    assert "token vectors" not in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.slow
def test_verify_compares_token_vectors_too(late_dir: Path, tmp_path: Path) -> None:
    found = verify(late_dir).agreements
    assert [a.tool.rpartition(", ")[2] for a in found][3:] == ["MultiVectorEncoder"]
    assert all(a.distance < 1e-4 for a in found)
    shutil.copytree(late_dir, tmp_path / "copy")
    modules = tmp_path / "copy/multi_vector/modules.json"
    modules.write_text(json.dumps(json.loads(modules.read_text())[:3]))  # nothing normalises
    with pytest.raises(CheckpointError, match=r"MultiVectorEncoder embeds 9 probes"):
        verify(tmp_path / "copy")
    (tmp_path / "copy/multi_vector/model.safetensors.index.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"MultiVectorEncoder cannot read it \(.*found in dir"
    ):
        verify(tmp_path / "copy")


def test_weights_in_several_files(late_dir: Path, tmp_path: Path) -> None:
    from sentence_transformers import MultiVectorEncoder

    model = CAFe.from_pretrained(late_dir, device="cpu")
    saved = type(model.model).save_pretrained

    def small(self: Any, directory: Any) -> None:
        saved(self, directory, max_shard_size="300KB")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.model), "save_pretrained", small)
        model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    theirs = MultiVectorEncoder(str(tmp_path / "multi_vector"), device="cpu")
    found = theirs.encode(["a red cat"], convert_to_numpy=True)[0]
    np.testing.assert_allclose(found, model.encode_tokens("a red cat")[0], atol=1e-5)


def test_a_projection_of_another_model(late_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(late_dir, tmp_path / "copy")
    file = tmp_path / "copy/multi_vector/1_Dense/model.safetensors"
    save_file({"linear.weight": torch.zeros(16, 32)}, file)
    with pytest.raises(CheckpointError, match=r"linear\.weight is \[16, 32\].*64 dimensions"):
        CAFe.from_pretrained(tmp_path / "copy", device="cpu")
    file.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"1_Dense/model\.safetensors: cannot be read"):
        CAFe.from_pretrained(tmp_path / "copy", device="cpu")
    for weight in (
        torch.zeros(0, 64),
        torch.full((16, 64), torch.nan),
        torch.ones(16, 64, dtype=torch.int64),
    ):
        save_file({"linear.weight": weight}, file)
        with pytest.raises(CheckpointError, match=r"linear\.weight holds no finite numbers"):
            CAFe.from_pretrained(tmp_path / "copy", device="cpu")
    file.unlink()  # and modules.json still names it: never a model without token vectors
    with pytest.raises(CheckpointError, match=r"1_Dense/model\.safetensors: is missing; copy"):
        CAFe.from_pretrained(tmp_path / "copy", device="cpu")


def test_the_modules_are_all_of_tokens(late_dir: Path) -> None:
    modules = json.loads((late_dir / "multi_vector/modules.json").read_text())
    assert [m["type"].rpartition(".")[2] for m in modules] == [
        "Transformer",
        "Dense",
        "MultiVectorMask",
        "Normalize",
    ]
