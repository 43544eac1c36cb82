"""mteb runs a saved directory: every mock task, the encoder's contract, and `cafe evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from cafe.cli import main
from cafe.errors import DataError
from cafe.evaluation import registry as tasks
from cafe.evaluation.harness import mteb_task
from cafe.evaluation.harness.mteb_encoder import MtebEncoder, load_encoder, model_meta
from cafe.types import Image
from helpers.models import build_small_model, with_token_vectors

mteb = pytest.importorskip("mteb")


def grey_image(value: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (96, 96), (value, 255 - value, 60))


class Recorder:
    """Embeds by the number of parts and of characters, and keeps what it was given."""

    def __init__(self) -> None:
        self.inputs: list[Any] = []

    def __call__(self, inputs: Any) -> np.ndarray:
        self.inputs += list(inputs)
        parts = [value[0].content for value in inputs]
        texts = ["".join(p for p in own if isinstance(p, str)) for own in parts]
        return np.array(
            [[len(own), 1 + len(text)] for own, text in zip(parts, texts, strict=True)], np.float32
        )


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def encoder(recorder: Recorder) -> MtebEncoder:
    return MtebEncoder(recorder, model_meta("cafe/recorder"))


@pytest.mark.slow
def test_mteb_runs_every_mock_task_on_a_saved_directory(small_dir):
    found = mteb.mock_run(load_encoder(small_dir, device="cpu"))
    assert found.all_passed, found.to_markdown()
    summary = {modality: (status, failed) for status, modality, failed in found.modality_summary()}
    assert summary["image"][0].startswith("✓"), found.to_markdown()  # not left out in silence
    run = [name for name, status in found.items() if status is not None]
    assert {"MockAny2AnyRetrievalI2T", "MockAny2AnyRetrievalT2I", "MockVisualSTS"} <= set(run)
    assert len(run) >= 40


def test_a_directory_is_described_as_a_model_of_texts_and_images(small_dir, small_model):
    meta = load_encoder(small_dir, device="cpu").mteb_model_meta
    assert meta.modalities == ["text", "image"]
    assert meta.similarity_fn_name.value == "cosine"
    assert meta.name == f"cafe/{small_dir.name}"
    assert meta.embed_dim == small_model.embedding_dimension
    assert isinstance(load_encoder(small_dir, device="cpu"), mteb.EncoderProtocol)


def test_embeddings_are_those_of_the_model(small_dir, small_model):
    """Texts, images, and both, in order, over several batches."""
    encoder = load_encoder(small_dir, device="cpu")
    texts, images = ["a cat", "two dogs", ""], [grey_image(10), grey_image(120), grey_image(240)]
    expected = {
        "text": small_model.encode(texts),
        "image": small_model.encode(images),
        "both": small_model.encode(
            [{"image": p, "text": t} for p, t in zip(images, texts, strict=True)]
        ),
    }
    columns = {"text": {"text": texts}, "image": {"image": images}}
    columns["both"] = columns["text"] | columns["image"]
    for kind, of_kind in columns.items():
        batches = [{k: v[s] for k, v in of_kind.items()} for s in (slice(0, 2), slice(2, 3))]
        np.testing.assert_allclose(encoder.encode(batches), expected[kind], atol=2e-5)


def test_only_text_and_images_of_a_batch_are_read(encoder, recorder):
    image, rows = (
        grey_image(1),
        {"id": ["q1"], "query": ["q"], "title": ["t"], "text": ["the text"]},
    )
    encoder.encode([rows | {"image": [image]}])
    (message,) = recorder.inputs[0]
    shown, text = message.content
    assert isinstance(shown, Image)
    assert shown.source is image
    assert text == "the text"
    encoder.encode([{"text": ["a", ""], "image": [None, [image, image]]}])
    assert [len(value[0].content) for value in recorder.inputs[1:]] == [1, 2]


def test_similarities_are_cosines(encoder):
    import torch

    a, b = np.array([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[6.0, 8.0], [1.0, 0.0]])
    np.testing.assert_allclose(encoder.similarity(a, b), [[1, 0.6], [0.8, 0]], atol=1e-6)
    np.testing.assert_allclose(encoder.similarity_pairwise(a, b), [1, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"audio": [1], "id": ["a"]}, "mteb gives audio, id, but no text and no image"),
        ({"image": [None]}, "input 0 of a batch of mteb has neither text nor image"),
    ],
)
def test_what_cannot_be_read_is_named(encoder, batch, message):
    with pytest.raises(DataError, match=message):
        encoder.encode([batch])


def test_another_precision_is_refused(encoder):
    with pytest.raises(DataError, match="precision='int8': embeddings are float32"):
        encoder.encode([{"text": ["a"]}], precision="int8")


# ---------------------------------------------------------------- as tasks of `cafe evaluate`


@pytest.fixture
def mock_task(monkeypatch: pytest.MonkeyPatch) -> str:
    """One of mteb's own mock tasks (two images, two texts, no download) under its real name."""
    from importlib import import_module

    from mteb.mocks import ALL_MOCK_TASK_TEST_GRID

    task = next(t for t in ALL_MOCK_TASK_TEST_GRID if t.metadata.name == "MockAny2AnyRetrievalI2T")
    registry = import_module("mteb.get_tasks")._TASKS_REGISTRY
    monkeypatch.setitem(registry, task.metadata.name, type(task))
    return f"mteb:{task.metadata.name}"


@pytest.mark.slow
def test_a_task_of_mteb_becomes_a_result_file_that_is_kept(
    mock_task, small_dir, tmp_path, monkeypatch, capsys
):
    def cafe(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["cafe", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert ended.value.code in (0, None), err
        return out

    out = str(tmp_path / "results")
    shown = cafe("evaluate", str(small_dir), "--task", mock_task, "--json", out)
    assert "mteb:MockAny2AnyRetrievalI2T" in shown
    file = Path(out) / "mteb-MockAny2AnyRetrievalI2T.json"
    record = json.loads(file.read_text())
    assert set(record["scores"]) == {"ndcg_at_10"}
    assert 0 <= record["scores"]["ndcg_at_10"] <= 1
    assert record["intervals"] == {}
    mine = record["details"]["mteb"]
    assert mine["scores"]["test"][0]["main_score"] == record["scores"]["ndcg_at_10"]
    assert record["settings"]["prompts"]["image"]
    assert "(kept)" in cafe("evaluate", str(small_dir), "--task", mock_task, "--json", out)
    assert "ndcg_at_10" in cafe("compare", out, out)


def test_subsets_are_told_apart_and_the_mean_comes_first(recorder):
    from mteb.mocks import ALL_MOCK_TASK_TEST_GRID

    task = next(
        t for t in ALL_MOCK_TASK_TEST_GRID if t.metadata.name == "MockMultilingualVisionCentricQA"
    )
    result = mteb_task.run_mteb(recorder, task)
    mean, *parts = result.plain
    assert len(parts) == 2
    assert all(name.startswith(f"{mean}/test/") for name in parts)
    assert result.plain[mean] == pytest.approx(np.mean([result.plain[name] for name in parts]))
    assert result.ids == (f"{task.metadata.name}@{task.metadata.revision}",)


@pytest.mark.slow
def test_a_benchmark_is_its_tasks():
    names = tasks.task_names("mteb:MIEB(lite)")
    assert len(names) > 40
    assert "mteb:Winoground" in names
    assert tasks.task_names("mteb:Winoground") == ("mteb:Winoground",)
    assert tasks.task_names("pope") == ("pope",)
    assert tasks.find_task("mteb:Winoground").hub == "facebook/winoground"
    assert not tasks.is_scenes("mteb:Winoground")


def test_mistakes_are_named(small_dir, tmp_path):
    with pytest.raises(DataError, match=r"mteb:Winogrund: mteb has no such task.*'Winoground'"):
        tasks.task_names("mteb:Winogrund")
    with pytest.raises(DataError, match=r"a task with audio.*; cafe reads text and images"):
        tasks.task_names("mteb:GTZANGenre")
    task: Any = tasks.find_task("mteb:Winoground")
    setup = tasks.TaskSetup(None, data=tmp_path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="mteb has its own samples; leave out --data"):
        task.run(setup)


def test_data_that_cannot_be_loaded_is_one_error(recorder, monkeypatch):
    task = mteb_task.find_mteb_task("mteb:Winoground")

    def no_network() -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(task, "load_data", no_network)
    with pytest.raises(DataError, match=r"mteb:Winoground: its data set cannot be loaded \(no rou"):
        mteb_task.run_mteb(recorder, task)


# ---------------------------------------------------------------- late interaction


@pytest.fixture(scope="module")
def late_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("late")
    with_token_vectors(build_small_model()).save_pretrained(directory)
    return directory


def test_token_vectors_are_compared_by_max_sim(late_dir: Path) -> None:
    from cafe.model.vlm import CAFe

    encoder = load_encoder(late_dir, device="cpu", multi_vector=True)
    model = CAFe.from_pretrained(late_dir, device="cpu")
    texts, images = ["a cat", "two dogs at the top", "no"], [grey_image(10), grey_image(200)]
    queries, documents = encoder.encode([{"text": texts}]), encoder.encode([{"image": images}])
    assert queries.ndim == 3
    expected = model.max_sim(model.encode_tokens(texts), model.encode_tokens(images))
    np.testing.assert_allclose(encoder.similarity(queries, documents), expected, atol=1e-5)
    pairwise = encoder.similarity_pairwise(queries[:2], documents)
    np.testing.assert_allclose(pairwise, expected.diagonal(), atol=1e-5)
    meta = encoder.mteb_model_meta
    assert (meta.embed_dim, meta.similarity_fn_name.value) == (16, "MaxSim")
    with pytest.raises(DataError, match="precision='int8'"):
        encoder.encode([{"text": ["a"]}], precision="int8")


@pytest.mark.slow
def test_mteb_searches_by_token_vectors_as_by_its_own_wrapper(late_dir: Path) -> None:
    from mteb.mocks import ALL_MOCK_TASK_TEST_GRID
    from mteb.models.sentence_transformer_wrapper import MultiVectorWrapper
    from sentence_transformers import MultiVectorEncoder

    task = next(t for t in ALL_MOCK_TASK_TEST_GRID if t.metadata.name == "MockRetrievalTask")
    own: Any = load_encoder(late_dir, device="cpu", multi_vector=True)
    theirs = MultiVectorWrapper(MultiVectorEncoder(str(late_dir / "multi_vector"), device="cpu"))
    options: Any = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
    results = [mteb.evaluate(model, task, **options).task_results[0] for model in (own, theirs)]
    found, expected = (
        {split: [one["main_score"] for one in of_split] for split, of_split in r.scores.items()}
        for r in results
    )
    assert found == expected
    assert found
