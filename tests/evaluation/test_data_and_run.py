"""Folders become images; a model, a task and data become one result that explains itself."""

from __future__ import annotations

import json
from pathlib import Path

import PIL.Image
import pytest

from cafe.data.scenes import mentioned_classes, read_truth, write_scenes
from cafe.errors import DataError
from cafe.evaluation.datasets.captioned import read_captioned_images
from cafe.evaluation.run import Outcome, TasksFailedError, evaluate
from cafe.evaluation.scenes.held_out import HELD_OUT_SEED, scene_images, scene_items
from cafe.media import open_image
from cafe.types import Image


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "test"
    write_scenes(folder, 5, 3, split="test", questions_per_scene=4)
    return folder


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Three images, the first with two captions, and two records that cannot be used."""
    for name in "abc":
        PIL.Image.new("RGB", (40, 40), "red").save(tmp_path / f"{name}.png")
    records = [
        {
            "id": i,
            "image": image,
            "conversations": [turn("human", "<image>\nSay."), turn("gpt", text)],
        }
        for i, (image, text) in enumerate(
            [
                ("a.png", "one"),
                ("b.png", "two"),
                ("a.png", "three"),
                ("c.png", "four"),
                ("d.png", "x"),
            ]
        )
    ]
    both = [turn("human", "<image><image>\nSay."), turn("gpt", "five")]
    records.append({"id": 5, "image": ["a.png", "b.png"], "conversations": both})
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(records))
    return file


def turn(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


def test_a_scenes_folder_gives_captions_questions_with_kinds_and_the_truth(scenes):
    images = read_captioned_images(scenes).images
    records = {r["image"]: r for r in json.loads((scenes / "questions.json").read_text())}
    assert len(images) == 5
    for image, truth in zip(images, read_truth(scenes), strict=True):
        assert image.image.key == str(scenes / truth.image)
        assert image.kinds == {item.kind for item in truth.scene.objects}
        assert image.kinds == mentioned_classes(image.captions[0])
        assert [q.kind for q in image.questions] == records[truth.image]["kinds"]
        spoken = [t["value"] for t in records[truth.image]["conversations"]]
        assert spoken[0] == "<image>\n" + image.questions[0].text
        assert spoken[1::2] == [q.answer for q in image.questions]
        prompt, answer = image.dialogues[0]
        assert isinstance(prompt.content[0], Image)
        assert (prompt.text, answer.text) == ("Describe this image.", truth.caption)


def test_llava_captions_come_together_by_image_and_what_is_skipped_is_reported(captions):
    found = read_captioned_images(captions)
    assert [p.captions for p in found.images] == [("one", "three"), ("two",), ("four",)]
    assert [len(p.dialogues) for p in found.images] == [2, 1, 1]
    assert [p.kinds for p in found.images] == [None, None, None]
    missing, two = found.skipped
    assert "image 'd.png': no such file in" in missing
    assert two.endswith("captions.json, 5: 2 images, expected one")
    assert read_captioned_images(captions.parent).images[0].captions == ("one", "three")
    assert len(read_captioned_images(captions, limit=1).images) == 1


def test_a_folder_without_data_and_a_file_without_captions_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"no truth\.jsonl and no captions\.json"):
        read_captioned_images(tmp_path)
    (tmp_path / "captions.json").write_text("[]")
    with pytest.raises(DataError, match="it has no records"):
        read_captioned_images(tmp_path)


def test_a_broken_question_record_is_named(scenes, tmp_path):
    (tmp_path / "truth.jsonl").write_text((scenes / "truth.jsonl").read_text())
    records = json.loads((scenes / "questions.json").read_text())
    records[2]["kinds"].pop()
    (tmp_path / "questions.json").write_text(json.dumps(records))
    with pytest.raises(DataError, match=r"questions\.json, record 2: not an image's questions"):
        read_captioned_images(tmp_path)


def test_a_missing_image_of_a_scene_is_named(scenes, tmp_path):
    (tmp_path / "truth.jsonl").write_text((scenes / "truth.jsonl").read_text())
    with pytest.raises(DataError, match=r"000000\.png: no such image; write the folder again"):
        read_captioned_images(tmp_path)


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("retrieval", {"image_to_text_recall@10", "text_to_image_recall@1"}),
        ("caption", {"caption_loss", "caption_object_f1", "caption_object_precision"}),
        ("presence", {"presence_accuracy", "question_accuracy"}),
        ("gap", {"modality_gap", "alignment", "uniformity/text", "effective_rank/image"}),
    ],
)
def test_each_task_runs_a_real_model_and_says_how(small_model, scenes, task, names):
    result = evaluate(small_model, task, data=scenes, limit=4)[task]
    assert names <= set(result["scores"])
    assert result["task"] == task
    assert result["count"] == (16 if task == "presence" else 4)
    assert (result["settings"]["data"], result["settings"]["limit"]) == (str(scenes), 4)
    assert {"torch", "transformers"} <= set(result["packages"])
    assert json.loads(json.dumps(result)) == result


def test_captions_of_other_people_are_measured_too(small_model, captions):
    message = r"2 records cannot be used; fix or remove them\. The first: .*'d\.png': no such file"
    for data in (captions, captions.parent):
        with pytest.raises(DataError, match=message):
            evaluate(small_model, "gap", data=data, limit=1)
    captions.write_text(json.dumps(json.loads(captions.read_text())[:4]))
    records = evaluate(small_model, ["retrieval", "caption"], data=captions)
    assert records["retrieval"]["count"] == 3
    assert set(records["caption"]["scores"]) == {"caption_loss"}
    with pytest.raises(DataError, match="no image has a question"):
        evaluate(small_model, "presence", data=captions)


def test_without_data_the_same_held_out_scenes_are_drawn(small_model):
    first, second = (evaluate(small_model, "retrieval", limit=3)["retrieval"] for _ in range(2))
    assert first == second
    assert first["count"] == 3
    assert first["settings"]["data"].startswith("scenes:test?seed=")


def test_a_failed_task_is_an_error_that_has_the_records_of_the_others(small_model, scenes, capsys):
    outcomes: list[Outcome] = []
    names = ["mmeb", "gap"]
    message = r"1 of 2 tasks could not be run: mmeb: .*none of MMEB"
    with pytest.raises(TasksFailedError, match=message) as caught:
        evaluate(small_model, names, data=scenes, limit=3, on_outcome=outcomes.append)
    assert [(o.task, o.state) for o in outcomes] == [("mmeb", "failed"), ("gap", "measured")]
    assert caught.value.records == {"gap": outcomes[1].record}
    assert caught.value.reasons == {"mmeb": outcomes[0].reason}
    assert capsys.readouterr() == ("", "")


def test_a_bar_is_drawn_only_when_asked_for(small_model, capsys):
    evaluate(small_model, "gap", limit=3)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(DataError, match="name tasks or a suite, not both"):
        evaluate(small_model, "gap", suite="quick")


def test_a_model_in_memory_is_never_taken_for_an_earlier_one(small_model, tmp_path):
    first = evaluate(small_model, "gap", limit=3, out=tmp_path)["gap"]
    assert first["model"] == "in memory"
    assert json.loads((tmp_path / "gap.json").read_text()) == first
    with pytest.raises(DataError, match=r"gap\.json is there, and may be .* of other weights"):
        evaluate(small_model, "gap", limit=3, out=tmp_path)
    assert evaluate(small_model, "gap", limit=3, out=tmp_path, force=True)["gap"] == first


def test_drawn_scenes_are_those_that_a_folder_has(tmp_path):
    write_scenes(tmp_path / "a", 4, HELD_OUT_SEED, split="test", questions_per_scene=5)
    written = read_captioned_images(tmp_path / "a").images
    for drawn, item, stored in zip(
        scene_images(4, 5), scene_items(None, 4), scene_items(tmp_path / "a", 4), strict=True
    ):
        other = next(p for p in written if p.id == drawn.id)
        assert (drawn.captions, drawn.questions, drawn.kinds) == (
            other.captions,
            other.questions,
            other.kinds,
        )
        assert drawn.dialogues[0][1:] == other.dialogues[0][1:]
        assert (item.scene, item.caption) == (stored.scene, stored.caption)
        assert open_image(item.image).tobytes() == open_image(stored.image).tobytes()


def test_a_scenes_folder_that_lost_a_image_is_told(tmp_path):
    write_scenes(tmp_path / "a", 3, 1, split="test")
    (tmp_path / "a" / "images" / "000001.png").unlink()
    with pytest.raises(DataError, match=r"000001\.png: no such image"):
        scene_items(tmp_path / "a", None)
    with pytest.raises(DataError, match="at least two scenes"):
        scene_items(None, 1)
