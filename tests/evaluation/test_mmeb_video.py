"""MMEB-V2's 18 video data sets, from folders made after the benchmark's own loaders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from cafe.errors import DataError, ImageError
from cafe.evaluation.mmeb.groups import FRAMES, IMAGE, VIDEO, VISDOC, Modality, overall_means
from cafe.evaluation.mmeb.tasks import mmeb_videos
from cafe.evaluation.mmeb.video import VIDEO_SETS, video_queries
from cafe.evaluation.run import Options, run_tasks
from cafe.media import open_image, open_video
from cafe.model.rows.rows import identity
from cafe.types import Conversation, Image, Video, user

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def frames(folder: Path, *colours: str, first: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, colour in enumerate(colours, first):
        PIL.Image.new("RGB", (32, 32), COLOURS[colour]).save(folder / f"frame_{number}.png")


def rows(file: Path, *records: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def seen(inputs: Sequence[Any]) -> np.ndarray:
    """Embeds by colour: of every frame's first pixel, and the colour words that end the text."""
    vectors = []
    for (message,) in inputs:
        vector = np.full(3, 1e-3)
        for part in message.content:
            if isinstance(part, Video):
                clip = open_video(part, FRAMES)
                vector += np.mean([np.array(f)[0, 0] for f in clip.frames], axis=0) / 255
            elif isinstance(part, Image):
                vector += np.array(open_image(part))[0, 0] / 255
            else:
                last = part.splitlines()[0].split(":")[-1] if "Options" in part else part
                vector += [float(name in last.split("(A)")[0].split("A. ")[0]) for name in COLOURS]
        vectors.append(vector / np.linalg.norm(vector))
    return np.array(vectors, dtype=np.float32)


def parts(conversation: Conversation) -> list[Any]:
    """Texts, and of videos and images the places of their files."""
    found = []
    for part in conversation[0].content:
        match part:
            case Video(source=tuple() as files):
                found.append([Path(str(f)).name for f in files])
            case Image():
                found.append(Path(str(part.source)).name)
            case _:
                found.append(part)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Each data set twice over: a red video (or question) and a green one."""
    root = tmp_path / "video-tasks"
    for name, data_set in VIDEO_SETS.items():
        of_set = root / "frames" / data_set.frames
        if name not in ("MVBench", "ActivityNetQA", "QVHighlight", "Charades-STA", "MomentSeeker"):
            frames(of_set / "1", "red")
            frames(of_set / "2", "green")
        if data_set.classes:
            file = root / "data" / f"{data_set.rows}.jsonl"
            rows(
                file, *({"video_id": str(i), "pos_text": c} for i, c in ((1, "red"), (2, "green")))
            )
            others = [f"class {i}" for i in range(data_set.classes - 2)]
            labels = root / "labels" / f"{name}.txt"
            labels.parent.mkdir(exist_ok=True)
            labels.write_text("\n".join(["red", "green", *others]))
    data = root / "data"
    rows(data / "ssv2.jsonl",
         {"video_id": 1, "pos_text": "red", "neg_text": ["blue", "red", "green"]},
         {"video_id": 2, "pos_text": "blue", "neg_text": ["blue", "red", "green"]})  # fmt: skip
    _questions(root)
    for stem, columns in {
        "didemo": ("video", "caption"), "msr-vtt": ("video_id", "caption"),
        "msvd": ("video_id", "caption"), "vatex": ("videoID", "enCap"),
        "youcook2-val": ("id", "sentence"),
    }.items():  # fmt: skip
        several = stem in ("msvd", "vatex")
        texts = [["red", "blue"], ["green"]] if several else ["red", "green"]
        names = ["a/1.mp4", "a/2.mp4"] if stem == "didemo" else ["1", "2"]
        records = (dict(zip(columns, pair, strict=True)) for pair in zip(names, texts, strict=True))
        rows(data / f"{stem}.jsonl", *records)
    _moments(root)
    return root


def _questions(root: Path) -> None:
    """Every first question is answered rightly, every second wrongly."""
    qa = root / "frames" / "video_qa"
    for subset in VIDEO_SETS["MVBench"].subsets:
        frames(qa / "MVBench" / subset / "1.mp4", "red")
        options = {"candidates": ["blue", "red"], "video": "1.mp4", "question": "Colour?"}
        records = [options | {"answer": answer} for answer in ("red", "blue")]
        file = root / "data" / "mvbench" / f"{subset}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(records))
    letters = ["A. blue.", "B. red.", "C. green."]
    rows(root / "data" / "video-mme.jsonl",
         {"videoID": "1", "question": "Colour?", "options": letters, "answer": "B"},
         {"videoID": "1", "question": "Colour?", "options": letters, "answer": "A"})  # fmt: skip
    five = {f"a{i}": text for i, text in enumerate(("blue", "red", "green", "no", "two"))}
    rows(root / "data" / "nextqa.jsonl",
         {"video": 1, "question": "Colour?", "answer": 1, **five},
         {"video": 1, "question": "Colour?", "answer": 0, **five})  # fmt: skip
    rows(root / "data" / "egoschema.jsonl",
         {"video_idx": "1", "question": "Colour?", "answer": "1", "option": letters},
         {"video_idx": "1", "question": "Colour?", "answer": "2", "option": letters})  # fmt: skip
    for name in "12":
        frames(qa / "ActivityNetQA" / f"v_{name}", "red")
    rows(root / "data" / "activitynetqa.jsonl",
         {"video_name": "1", "question": "is it red", "answer": "yes"},
         {"video_name": "2", "question": "is it red", "answer": "no"})  # fmt: skip


def _moments(root: Path) -> None:
    moments = root / "frames" / "video_mret"
    for name, stem in (("QVHighlight", "qvhighlight"), ("Charades_STA", "charades_sta")):
        frames(moments / name / "a" / "query", "red")
        frames(moments / name / "a" / "positive_clip", "red")
        frames(moments / name / "a" / "negative_1", "green")
        frames(moments / name / "b" / "query", "red")
        frames(moments / name / "b" / "positive_clip", "blue")
        frames(moments / name / "b" / "negative_1", "red")
        asked = [{"query": "red", "video_path": path} for path in ("x/a.mp4", "b.mp4")]
        rows(root / "data" / f"{stem}.jsonl", *asked)
    clips = moments / "MomentSeeker" / "video_frames"
    for clip, colour in (("m_1", "red"), ("m_2", "green"), ("m_3", "blue"), ("m_whole", "green")):
        frames(clips / clip, colour)
    image = moments / "MomentSeeker" / "query_p.jpg"
    PIL.Image.new("RGB", (32, 32), COLOURS["blue"]).save(image)

    def sought(query: str, given: str, right: str, *wrong: str) -> dict[str, Any]:
        return {
            "query": query,
            "input_frames": given,
            "positive_frames": [{"output_path": f"m/{right}.mp4"}],
            "negative_frames": [{"output_path": f"m/{clip}.mp4"} for clip in wrong],
        }

    rows(root / "data" / "momentseeker_1k6.jsonl",
         sought("red", "", "1", "2", "3"),
         sought("it", "m/whole.mp4", "2", "1", "3"),
         sought("it", "p.jpg", "3", "1", "2"),
         sought("red", "", "2", "1", "3"))  # fmt: skip


def test_every_data_set_is_read_and_ranked_as_the_benchmark_does(folder):
    result = mmeb_videos(seen, folder)
    wrong_half = {
        "SmthSmthV2", "MVBench", "Video-MME", "NExTQA", "EgoSchema", "QVHighlight",
        "Charades-STA", "ActivityNetQA",
    }  # fmt: skip
    expected = {name: 0.5 if name in wrong_half else 1.0 for name in VIDEO}
    # "yes" and "no" name no colour: a tie, which is a miss for both questions.
    expected |= {"ActivityNetQA": 0.0, "MomentSeeker": 0.75}
    means = {
        meta: np.mean([expected[name] for name in VIDEO if VIDEO[name] == meta])
        for meta in dict.fromkeys(VIDEO.values())
    }
    means["all"] = np.mean(list(expected.values()))
    assert result.scores == {n: pytest.approx(v) for n, v in {**expected, **means}.items()}
    assert result.details["missing"] == []
    assert result.details["queries"]["MVBench"] == 40
    assert result.details["modality"] == "video"
    assert list(VIDEO_SETS) == list(VIDEO)


def test_queries_show_the_video_first_and_say_what_the_benchmark_says(folder):
    def first(name: str, number: int = 0) -> tuple[list[Any], list[list[Any]], tuple[int, ...]]:
        asked = list(video_queries(folder, name, None).queries)[number]
        return parts(asked.query), [parts(c) for c in asked.candidates], asked.positives

    frame = ["frame_1.png"]
    question = (
        "Given a video and a question, select the most accurate answer from the provided "
        "candidates. Return only the exact text of your chosen answer. Question: "
    )
    assert first("MVBench") == (
        [frame, question + "Colour?\nOptions:\n(A) blue\n(B) red"],
        [["(A) blue"], ["(B) red"]],
        (1,),
    )
    assert first("Video-MME") == (
        [frame, question + "Colour?\nA. blue.\nB. red.\nC. green."],
        [["blue"], ["red"], ["green"]],
        (1,),
    )
    assert first("EgoSchema")[0][1] == question + "Colour?A. blue. B. red. C. green."
    assert first("NExTQA")[1] == [["blue"], ["red"], ["green"], ["no"], ["two"]]
    assert first("ActivityNetQA", 1) == (
        [frame, question + "is it red? (A) yes; (B) no."], [["yes"], ["no"]], (1,),
    )  # fmt: skip
    query, candidates, right = first("MSVD", 1)
    assert query == ["Find the video snippet that corresponds to the given summary: green"]
    assert candidates == [[frame, "Understand the content of the provided video."]] * 2
    assert right == (1,)
    query, candidates, right = first("K700")
    assert query == [frame, "Recognize the category of the video content."]
    assert len(candidates) == 700
    assert [candidates[i] for i in right] == [["red"]]
    query, candidates, right = first("QVHighlight")
    assert (
        query[1] == "Find the clip that corresponds to the described scene in the given video: red"
    )
    assert (len(candidates), right) == (2, (1,))
    assert first("MomentSeeker", 2)[0] == [
        "query_p.jpg", "Select the video clip that aligns with the given text and image: it",
    ]  # fmt: skip


def test_frames_are_in_the_order_of_their_numbers_and_evenly_spaced(folder):
    shown = folder / "frames" / "video_cls" / "SSv2" / "1"
    frames(shown, *["red"] * 22)
    (shown / "notes.txt").write_text("no frame")
    video = next(video_queries(folder, "SmthSmthV2", 1).queries).query[0].content[0]
    assert isinstance(video, Video)
    assert isinstance(video.source, tuple)
    # linspace(0, 21, 8), cut to whole numbers, as the benchmark cuts them.
    numbers = [f"frame_{1 + i}.png" for i in (0, 3, 6, 9, 12, 15, 18, 21)]
    assert [Path(str(f)).name for f in video.source] == numbers
    again = Video(video.source)
    assert again.key == video.key
    assert identity(user(again)) == identity(user(video))
    assert identity(user(Video(video.source[1:]))) != identity(user(video))


def test_a_limit_makes_fewer_queries_among_the_same_candidates(folder):
    found = list(video_queries(folder, "MSR-VTT", 1).queries)
    assert [(q.id, len(q.candidates)) for q in found] == [("0", 2)]
    assert [len(list(video_queries(folder, n, 1).queries)) for n in ("NExTQA", "K700")] == [1, 1]


def test_the_benchmarks_patchy_sets_leave_rows_without_frames_out_and_others_do_not(folder):
    for name in ("MSVD", "MSR-VTT"):
        gone = folder / "frames" / "video_ret" / name / "2"
        for file in gone.iterdir():
            file.unlink()
        gone.rmdir()
    assert video_queries(folder, "MSVD", None).skipped == 1
    with pytest.raises(DataError, match=r"msr-vtt\.jsonl, line 2: .*MSR-VTT/2: no frames of this"):
        video_queries(folder, "MSR-VTT", None)
    (folder / "frames" / "video_ret" / "MSR-VTT" / "2").mkdir()
    with pytest.raises(DataError, match="no frames of this video; unpack the frames"):
        video_queries(folder, "MSR-VTT", None)


def test_class_names_are_all_there_or_the_file_is_named(folder):
    labels = folder / "labels" / "K700.txt"
    labels.unlink()
    with pytest.raises(DataError, match=r"K700\.txt: K700 has 700 classes, and 2 are known; list"):
        video_queries(folder, "K700", None)
    labels.write_text("\n".join(f"class {i}" for i in range(700)))
    with pytest.raises(DataError, match="the rows name class 'green', which is not in it"):
        video_queries(folder, "K700", None)


@pytest.mark.parametrize(
    ("name", "file", "record", "message"),
    [
        ("MSR-VTT", "msr-vtt", {"video_id": "1"}, "line 1: 'caption' is null, expected text; the"),
        ("SmthSmthV2", "ssv2", {"video_id": 1, "pos_text": "x", "neg_text": ["y"]},
         "the right one, 'x', is not among the 1 of 'neg_text'"),
        ("NExTQA", "nextqa", {"video": 1, "question": "?", "answer": 5,
                              **{f"a{i}": "x" for i in range(5)}},
         "'answer' is '5', expected a number below 5"),
        ("VATEX", "vatex", {"videoID": "1", "enCap": []}, "'enCap' is an empty list, expected"),
        ("HMDB51", "hmdb51", {"video_id": "../1", "pos_text": "x"}, "is outside the folder"),
        ("MomentSeeker", "momentseeker_1k6",
         {"query": "x", "positive_frames": [], "negative_frames": []},
         "'positive_frames' is empty; every query needs its clip"),
        ("QVHighlight", "qvhighlight", {"query": "x", "video_path": "none.mp4"}, "no frames of"),
    ],
)  # fmt: skip
def test_bad_rows_are_told_with_their_place(folder, name, file, record, message):
    rows(folder / "data" / f"{file}.jsonl", record)
    with pytest.raises(DataError, match=message):
        list(video_queries(folder, name, None).queries)


def test_rows_that_are_not_here_come_from_the_hub_or_the_place_for_them_is_named(
    folder, monkeypatch
):
    import datasets

    (folder / "data" / "nextqa.jsonl").unlink()
    five = {f"a{i}": text for i, text in enumerate(("blue", "red", "green", "no", "two"))}
    stored = datasets.Dataset.from_list([{"video": 1, "question": "?", "answer": 1, **five}])
    asked: list[tuple[str, str | None]] = []

    def load(name: str, config: str | None) -> datasets.DatasetDict:
        asked.append((name, config))
        return datasets.DatasetDict({"test": stored})

    monkeypatch.setattr(datasets, "load_dataset", load)
    (query,) = video_queries(folder, "NExTQA", None).queries
    assert asked == [("VLM2Vec/NExTQA", "MC")]
    assert query.positives == (1,)

    def offline(name: str, config: str | None) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"no network\); download the rows and put .*nextqa\.jsonl"):
        video_queries(folder, "NExTQA", None)


def test_a_broken_frame_is_named(folder):
    (folder / "frames" / "video_cls" / "SSv2" / "1" / "frame_1.png").write_text("nothing")
    with pytest.raises(ImageError, match=r"frame_1\.png.*not an image"):
        mmeb_videos(seen, folder)


def test_the_overall_mean_is_over_all_78_and_missing_where_one_is():
    scores: dict[Modality, dict[str, float]] = {
        "image": dict.fromkeys(IMAGE, 0.2),
        "video": dict.fromkeys(VIDEO, 0.4),
        "visdoc": dict.fromkeys(VISDOC, 0.9),
    }
    assert overall_means(scores) == {
        "image": pytest.approx(0.2),
        "video": pytest.approx(0.4),
        "visdoc": pytest.approx(0.9),
        "all": pytest.approx((36 * 0.2 + 18 * 0.4 + 24 * 0.9) / 78),
    }
    del scores["video"]["K700"]
    assert overall_means(scores) == {"image": pytest.approx(0.2), "visdoc": pytest.approx(0.9)}


def test_a_real_model_watches_videos_and_the_report_is_the_leaderboards(
    folder, small_model, tmp_path
):
    for name in ("MVBench", "K700", "HMDB51", "UCF101"):  # few candidates are enough here
        (folder / "frames" / VIDEO_SETS[name].frames).rename(tmp_path / name)
    options = Options(data=folder, limit=1, out=tmp_path / "out")
    (outcome,) = run_tasks(lambda: small_model, "m", ["mmeb-video"], options)
    assert (outcome.state, outcome.reason) == ("measured", "")
    assert outcome.record is not None
    assert outcome.record["details"]["missing"] == ["K700", "HMDB51", "UCF101", "MVBench"]
    assert outcome.record["settings"]["frames"] == 8
    report = json.loads((tmp_path / "out" / "mmeb-report.json").read_text())
    assert set(report["metrics"]["video"]) == set(VIDEO) - {"K700", "HMDB51", "UCF101", "MVBench"}
    one = report["metrics"]["video"]["VATEX"]
    assert set(one) == {"hit@1", "num_pred", "num_data"}
    assert json.loads((tmp_path / "out" / "video" / "VATEX_score.json").read_text()) == one
