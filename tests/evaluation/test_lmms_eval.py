"""lmms-eval's requests become conversations; where lmms-eval is installed, it runs the model."""

from __future__ import annotations

import importlib.util
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from cafe.errors import DataError
from cafe.evaluation.harness.lmms_eval_requests import (
    MAX_NEW_TOKENS,
    GenerationSettings,
    conversation_of,
    question_of,
    settings_of,
)
from cafe.types import Image, Video

RED, BLUE = (PIL.Image.new("RGB", (96, 96), name) for name in ("red", "blue"))


def shown(conversation: Any) -> list[Any]:
    return [p if isinstance(p, str) else p.source for m in conversation for p in m.content]


def test_generation_settings():
    mme = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    assert settings_of(mme) == GenerationSettings(16)
    assert settings_of({"until": ["\n\n", ""]}) == GenerationSettings(MAX_NEW_TOKENS, (), ("\n\n",))
    assert settings_of({"until": "Q:", "max_gen_toks": 8}) == GenerationSettings(8, (), ("Q:",))
    sampled = settings_of({"temperature": 0.7, "top_p": 0.9, "image_aspect_ratio": "original"})
    assert dict(sampled.sampling) == {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert settings_of({"temperature": 0.7, "do_sample": False}).sampling == ()
    assert dict(settings_of({"num_beams": 3}).sampling) == {"num_beams": 3}


def test_an_answer_ends_before_the_first_stop():
    settings = GenerationSettings(8, (), ("\n\n", "Q:"))
    assert settings.cut("a cat Q: what\n\nelse") == "a cat"
    assert settings.cut("a cat") == "a cat"


def test_messages_keep_their_order():
    content = [
        {"type": "text", "text": "Which of"},
        {"type": "image", "url": RED},
        {"type": "image", "url": "b.PNG"},
        {"type": "video", "url": "c.mp4"},
    ]
    system = {"role": "system", "content": "Be brief."}
    found = conversation_of([system, {"role": "user", "content": content}])
    assert [m.role for m in found] == ["system", "user"]
    assert shown(found) == ["Be brief.", "Which of", RED, "b.PNG", "c.mp4"]
    assert [type(p) for p in found[1].content] == [str, Image, Image, Video]


def test_images_stand_at_their_placeholders_or_before_the_text():
    assert shown(question_of("Is <image> or <image>?", [RED, BLUE])) == [
        "Is ", RED, " or ", BLUE, "?",
    ]  # fmt: skip
    assert shown(question_of("<image>Why?", [RED])) == [RED, "Why?"]
    assert shown(question_of("Why?", [RED, BLUE])) == [RED, BLUE, "Why?"]
    assert shown(question_of("Why?", None)) == ["Why?"]


def test_what_the_model_cannot_take_is_named():
    audio = [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}]
    with pytest.raises(DataError, match="lmms-eval asks with 'audio'"):
        conversation_of(audio)
    with pytest.raises(DataError, match="lmms-eval shows a dict"):
        question_of("What?", [{"array": [0.0]}])


def test_the_entry_point_names_what_is_there():
    """Without lmms-eval: the module that pyproject.toml names has the function."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    points = tomllib.loads(text)["project"]["entry-points"]["lmms_eval.models"]
    module, name = points["cafe"].split(":")
    assert callable(getattr(import_module(module), name))


# ---------------------------------------------------------------- with the real package


@pytest.fixture(scope="module")
def lmms_eval() -> Any:
    from cafe.model.torchvision_pair import ensure_torchvision

    ensure_torchvision()  # lmms-eval imports torchvision before cafe is asked
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("lmms-eval is not installed")
    return pytest.importorskip("lmms_eval.evaluator")


@pytest.fixture
def task_folder(tmp_path) -> Any:
    """Two tasks of two images each in lmms-eval's own format; the data set is two local rows."""
    import datasets

    rows = {
        "image": [RED, BLUE],
        "question": ["Is it red?", "Is it blue?"],
        "answer": ["yes", "no"],
        "choices": [["yes", "no"], ["yes", "no"]],
        "label": [0, 1],
    }
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.to_parquet(str(tmp_path / "data" / "test.parquet"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "utils.py").write_text(
        "def visuals(doc):\n    return [doc['image'].convert('RGB')]\n"
        "def text(doc, **_):\n    return doc['question']\n"
    )
    common = f"""
dataset_path: {tmp_path / "data"}
test_split: test
doc_to_visual: !function utils.visuals
doc_to_text: !function utils.text
"""
    (folder / "say.yaml").write_text(
        common
        + """
task: cafe_say
output_type: generate_until
doc_to_target: answer
generation_kwargs: {max_new_tokens: 3, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
    )
    (folder / "choose.yaml").write_text(
        common
        + """
task: cafe_choose
output_type: multiple_choice
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
    )
    return folder


def run(lmms_eval: Any, task: str, folder: Any, model: Any, **more: Any) -> list[Any]:
    """The samples of a run of lmms-eval."""
    from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    found = lmms_eval.simple_evaluate(
        model="cafe",
        model_args=f"pretrained={model},dtype=float32",
        tasks=[task],
        batch_size="2",
        device="cpu",
        task_manager=TaskManager(include_path=str(folder), model_name="cafe"),
        bootstrap_iters=0,
        log_samples=True,
        **more,
    )
    return found["samples"][task]


def test_lmms_eval_finds_the_model_by_its_entry_point(lmms_eval):
    from lmms_eval.models import MODEL_REGISTRY_V2  # pyright: ignore[reportMissingImports]

    assert MODEL_REGISTRY_V2.get_model_class("cafe").__name__ == "CafeChat"
    assert MODEL_REGISTRY_V2.get_model_class("cafe", force_simple=True).__name__ == "CafeSimple"


@pytest.mark.slow
def test_lmms_eval_asks_and_the_model_answers(lmms_eval, task_folder, small_dir, small_model):
    expected = small_model.generate(
        [{"image": RED, "text": "Is it red?"}, {"image": BLUE, "text": "Is it blue?"}],
        max_new_tokens=3,
    )
    for more in ({}, {"force_simple": True}):
        samples = run(lmms_eval, "cafe_say", task_folder, small_dir, **more)
        assert [s["filtered_resps"][0].strip() for s in samples] == [e.strip() for e in expected]


@pytest.mark.slow
def test_lmms_eval_compares_likelihoods(lmms_eval, task_folder, small_dir, small_model):
    from cafe.model.teacher_forced import score_examples
    from cafe.types import Example, Message, user

    samples = run(lmms_eval, "cafe_choose", task_folder, small_dir, force_simple=True)
    for sample, image, text in zip(
        samples, (RED, BLUE), ("Is it red?", "Is it blue?"), strict=True
    ):
        question = user(Image(image), text)
        example = Example("q", dialogues=tuple(
            (*question, Message("assistant", (word,))) for word in ("yes", "no")
        ))  # fmt: skip
        (reading,) = score_examples(small_model, [example])
        told = [float(resp[0]) for resp in sample["filtered_resps"]]
        assert told == pytest.approx([-a.nll_nats for a in reading.answers], rel=1e-3)
