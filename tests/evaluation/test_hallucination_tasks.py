"""POPE, CHAIR and THRONE in their published layouts, against tables that a person can check."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cafe.errors import DataError
from cafe.evaluation.datasets.object_words import chair_mentions, coco_words, plurals
from cafe.evaluation.journal import Journal
from cafe.evaluation.scoring import score_intervals
from cafe.evaluation.tasks.chair import chair, chair_result, read_chair
from cafe.evaluation.tasks.judges import EndpointJudge, Inquiry, SequenceJudge, make_judge
from cafe.evaluation.tasks.pope import pope, read_pope
from cafe.evaluation.tasks.throne import inquiries, read_throne, throne
from cafe.model.teacher_forced import AnswerScore, TeacherForcedScores
from cafe.types import Conversation, Example
from helpers.metric_reference import chair_scores, pope_scores, throne_scores

SYNONYMS = """\
person, man, woman, baby, passenger
chair, seat, stool
bird, ostrich
toilet
train, locomotive
hot dog
dog, puppy, doberman
tie, bow
wine glass
traffic light, street light
"""


def png(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (4, 4)).save(path)
    return path.read_bytes()


def never(examples: Sequence[Example]) -> list[TeacherForcedScores]:
    """Reads as a model would that never writes exactly a likely reply."""
    return [
        TeacherForcedScores(None, None, (AnswerScore(1.0, 1, False),) * len(e.dialogues))
        for e in examples
    ]


def says(replies: dict[str, str]) -> Any:
    """Generates by the question."""
    return lambda conversations, _: [replies[c[0].text] for c in conversations]


# ---------------------------------------------------------------- POPE

QUESTIONS = [("a", "dog", "yes"), ("a", "cat", "no"), ("b", "dog", "no"), ("b", "bus", "yes")]
REPLIES = {"dog": "Yes, there is.", "cat": "No.", "bus": "There is not a bus."}


def question(thing: str) -> str:
    return f"Is there a {thing} in the image?"


@pytest.fixture
def pope_folder(tmp_path: Path) -> Path:
    for name in ("random", "popular", "adversarial"):
        lines = [
            json.dumps({"question_id": i, "image": f"{p}.jpg", "text": question(t), "label": label})
            for i, (p, t, label) in enumerate(QUESTIONS, 1)
        ]
        text = "\n\n".join(lines) + "\n\n"  # the authors' files have no empty lines, copies do
        (tmp_path / f"coco_pope_{name}.json").write_text(text)
    for image in "ab":
        png(tmp_path / "val2014" / f"{image}.jpg")
    return tmp_path


def test_pope_reads_the_authors_files_and_counts_as_they_do(pope_folder):
    asked = read_pope(pope_folder)
    replies = {question(thing): reply for thing, reply in REPLIES.items()}
    result = pope(never, says(replies), asked)
    # dog in a: yes, right. cat in a: no, right. dog in b: yes, wrong. bus in b: no, wrong.
    expected = pope_scores([True, False, True, False], [True, False, False, True])
    for name, value in expected.items():
        assert result.scores[f"popular/{name}"] == result.scores[f"mean/{name}"] == value
    assert expected["precision"] == expected["recall"] == expected["accuracy"] == 0.5
    assert result.count == 12
    silent = pope(never, lambda asked, _: [""] * len(asked), read_pope(pope_folder))
    assert silent.details["empty_replies"] == 12
    assert silent.scores["mean/yes_ratio"] == 1  # nothing said is a yes, by the official parser
    assert result.items["random/right"].tolist() == [2, 0]  # per image


def test_pope_asks_all_classes_where_the_annotations_are(pope_folder):
    instances = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "categories": [{"id": 7, "name": "dog"}, {"id": 9, "name": "elephant"}],
        "annotations": [{"image_id": 1, "category_id": 7}, {"image_id": 1, "category_id": 7}],
    }
    (pope_folder / "instances_val2014.json").write_text(json.dumps(instances))
    asked = [q for q in read_pope(pope_folder) if q.setting == "all"]
    assert [(q.image_name, q.text, q.label) for q in asked] == [
        ("a.jpg", "Is there a dog in the image?", True),
        ("a.jpg", "Is there an elephant in the image?", False),
        ("b.jpg", "Is there a dog in the image?", False),
        ("b.jpg", "Is there an elephant in the image?", False),
    ]


def test_pope_reads_the_hubs_rows_too(pope_folder, tmp_path):
    image = {"bytes": png(tmp_path / "x.png"), "path": "x.png"}
    rows = [
        {
            "question_id": str(i), "question": question(t), "answer": label, "image_source": p,
            "image": image, "category": "Adversarial",
        }
        for i, (p, t, label) in enumerate(QUESTIONS)
    ]  # fmt: skip
    folder = tmp_path / "rows" / "data"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")
    from_rows, from_files = read_pope(folder.parent), read_pope(pope_folder)
    own = [q for q in from_files if q.setting == "adversarial"]
    assert [(q.text, q.label) for q in from_rows] == [(q.text, q.label) for q in own]
    assert from_rows[0].image is from_rows[1].image is not from_rows[2].image
    assert len(read_pope(folder.parent, limit=1)) == 2  # images, not questions


def test_broken_pope_files_are_told(pope_folder):
    (pope_folder / "coco_pope_popular.json").write_text('{"image": "a.jpg", "text": "?"}')
    with pytest.raises(DataError, match=r"popular\.json, line 1: not a question of POPE"):
        read_pope(pope_folder)
    random = pope_folder / "coco_pope_random.json"
    random.write_text("\n".join([random.read_text(), random.read_text().splitlines()[0]]))
    with pytest.raises(
        DataError, match=r"coco_pope_random\.json: two samples have the id 'a\.jpg, "
    ):
        read_pope(pope_folder)
    (pope_folder / "val2014" / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"b\.jpg: no such image"):
        read_pope(pope_folder)
    (pope_folder / "coco_pope_random.json").write_text(
        '{"image": "../a.jpg", "text": "?", "label": "no"}'
    )
    with pytest.raises(DataError, match="outside the folder"):
        read_pope(pope_folder)
    (pope_folder / "coco_pope_random.json").unlink()
    with pytest.raises(DataError, match=r"coco_pope_random\.json: missing"):
        read_pope(pope_folder)
    with pytest.raises(DataError, match="two samples have the id"):
        pope(never, says({}), [*read_pope_of(pope_folder), *read_pope_of(pope_folder)])
    with pytest.raises(DataError, match="no questions"):
        pope(never, says({}), [])


def read_pope_of(folder: Path) -> Any:
    for name in ("random", "popular", "adversarial"):
        line = json.dumps({"image": "a.jpg", "text": question("dog"), "label": "yes"})
        (folder / f"coco_pope_{name}.json").write_text(line)
    return read_pope(folder)


# ---------------------------------------------------------------- CHAIR


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    names = [line.split(",")[0] for line in SYNONYMS.splitlines()]
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}]
    instances = {
        "images": images,
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": 1, "category_id": names.index("dog")},
            {"image_id": 2, "category_id": names.index("train")},
        ],
    }
    captions = {
        "images": images,
        "annotations": [
            {"image_id": 1, "caption": "A puppy looks at a man."},
            {"image_id": 2, "caption": "An empty platform."},
        ],
    }
    for year in ("2014", "2017"):
        (tmp_path / f"instances_val{year}.json").write_text(json.dumps(instances))
        (tmp_path / f"captions_val{year}.json").write_text(json.dumps(captions))
        for name in "ab":
            png(tmp_path / f"val{year}" / f"{name}.jpg")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("Two men and a woman.", ["person", "person"]),
        ("A baby bird on a stool", ["bird", "chair"]),
        ("A baby on a stool", ["person", "chair"]),
        ("a passenger train with passengers", ["train", "person"]),
        ("A hot dog and wine glasses near traffic lights.",
         ["hot dog", "wine glass", "traffic light"]),
        ("a toilet with the seat up", ["toilet"]),
        ("a toilet seat", ["toilet"]),
        ("puppies", ["dog"]),
        ("a bow tie", ["tie"]),
        ("a dogged chairman", []),
        ("2 train tracks with a train", ["train"]),
        ("a train on a train track", ["train"]),
        ("the woman's dog's bowl", ["person", "dog"]),
        ("the woman\u2019s stool", ["person", "chair"]),
        ("a baby's dog", ["person", "dog"]),
        ("two persons with dobermans", ["person", "dog"]),
        ("several womans", ["person"]),
        ("", []),
    ],
)  # fmt: skip
def test_chair_reads_captions_by_its_rules(coco, text, objects):
    assert chair_mentions(coco_words(coco / "synonyms.txt"), text) == objects


def test_chair_counts_what_the_published_script_misses(tmp_path):
    """The differences that docs/evaluation.md lists; the lines are those of the published table."""
    file = tmp_path / "synonyms.txt"
    file.write_text(
        "motorcycle, scooter,  motor bike, motor cycle\nairplane, airbus\nbus, minibus\n"
        "boat, canoe\nbird, magpie\ntie, bow\ncake,  cheesecake\ncell phone, iPhone\n"
        "oven, stovetop oven, stove, stove top oven\ncar\ntruck\ndog\n"
    )
    words = coco_words(file)
    for text, objects in {
        "a bus, a minibus and an airbus": ["bus", "bus", "airplane"],
        "ties, canoes and magpies": ["tie", "boat", "bird"],
        "a motor bike and a cheesecake": ["motorcycle", "cake"],
        "an iPhone": ["cell phone"],
        "a stove top oven": ["oven"],
        "a car/truck and a **dog**": ["car", "truck", "dog"],
    }.items():
        assert chair_mentions(words, text) == objects, text


def test_plurals_follow_the_spelling():
    pairs = {"person": "people", "bus": "buses", "knife": "knives", "puppy": "puppies",
             "toy": "toys", "wine glass": "wine glasses", "couch": "couches", "sheep": "sheep",
             "fireman": "firemen", "mouse": "mice", "dog": "dogs",
             "thief": "thieves", "shelf": "shelves"}  # fmt: skip
    assert {name: plurals(name)[0] for name in pairs} == pairs


def test_chair_of_a_written_example(coco):
    images, mentions = read_chair(coco)
    # There: dog (annotated) and person (a reference names one); a train.
    assert [p.objects for p in images] == [{"dog", "person"}, {"train"}]
    texts = ["A dog, a bird and a bird on a chair.", "A train."]
    result = chair(lambda c, _: [texts.pop(0) for _ in c], images, mentions)
    told = [["dog", "bird", "bird", "chair"], ["train"]]
    expected = chair_scores(told, [p.objects for p in images], lengths_words=[10, 2])
    assert result.scores == pytest.approx(expected)
    # 3 of 5 mentions, 1 of 2 captions, 2 of the 3 objects that are there.
    assert (result.scores["chair_i"], result.scores["chair_s"]) == (0.6, 0.5)
    assert result.scores["recall"] == pytest.approx(2 / 3)
    low, high = score_intervals(result)["chair_i"][1:]
    assert low < 0.6 < high


def test_chair_and_throne_need_every_image(coco):
    for year, read in (("2014", read_chair), ("2017", read_throne)):
        (coco / f"val{year}" / "b.jpg").unlink()
        with pytest.raises(DataError, match=rf"val{year}/b\.jpg: no such image.*download"):
            read(coco)
        assert len(read(coco, 1)[0]) == 1  # of the first there is one


def test_chair_needs_its_files(coco):
    (coco / "synonyms.txt").write_text("person, man")
    with pytest.raises(DataError, match="no line names the class 'chair'"):
        read_chair(coco)
    (coco / "synonyms.txt").unlink()
    with pytest.raises(DataError, match=r"synonyms\.txt: cannot be read.*table of synonyms"):
        read_chair(coco)
    with pytest.raises(DataError, match="no images"):
        chair_result([], [], lambda _: [])


# ---------------------------------------------------------------- THRONE


class Scripted:
    """A judge that answers by thing, and may break after so many replies."""

    def __init__(self, name: str, replies: dict[str, list[str]], breaks_after: int = 10**6):
        self.name, self.replies, self.left = name, replies, breaks_after
        self.asked: list[Inquiry] = []

    def __call__(self, questions: Sequence[Inquiry]) -> Iterator[str]:
        counts: dict[str, int] = {}
        for one in questions:
            if not self.left:
                raise DataError("the judge is gone")
            self.left -= 1
            self.asked.append(one)
            form = [i.question for i in inquiries(one.text, one.thing)].index(one.question)
            counts[one.thing] = form
            yield self.replies[one.thing][form]


YES, NO = ["yes"] * 3, ["no"] * 3
CLASSES = ("dog", "cat", "tie")


def describe_as(text: str) -> Any:
    calls: list[Conversation] = []

    def generate(conversations: Sequence[Conversation], _: int) -> list[str]:
        calls.extend(conversations)
        return [text for _ in conversations]

    generate.calls = calls  # type: ignore[attr-defined]
    return generate


def test_throne_votes_nine_times_and_takes_out_what_is_not_unanimous(coco):
    images, classes = read_throne(coco)
    assert len(classes) == 10
    judges = [
        Scripted("a", {"dog": YES, "cat": NO, "tie": ["Yes", " yes ", "yes"]}),
        Scripted("b", {"dog": YES, "cat": NO, "tie": YES}),
        Scripted("c", {"dog": YES, "cat": ["no", "maybe", "no"], "tie": ["yes", "yes", "no"]}),
    ]
    result = throne(describe_as("x"), judges, images, CLASSES)
    # dog: 9 votes; cat: none (maybe is no vote); tie: 8, so it is disqualified.
    votes = np.array([[9, 0, 8]] * 2)
    present = np.array([[True, False, False], [False, False, False]])
    expected = throne_scores(votes, present)
    assert result.scores == pytest.approx({**expected, "evasive": 2 / 54})
    assert result.scores["disqualified"] == pytest.approx(1 / 3)
    assert result.details["evasive_replies"] == 2
    assert result.details["judges"] == ["a", "b", "c"]


def test_the_questions_are_those_of_throne():
    asked = inquiries("T" * 2000, "tie")
    assert [q.question for q in asked] == [
        "Please answer yes or no. Is there a necktie in this image?",
        "Is there a necktie in this image?",
        "Please answer yes or no. Does the text imply a necktie is in the image?",
    ]
    assert asked[0].prompt == (
        f"Text: {'T' * 1024}\n\nRead the text and answer the question.\n\n{asked[0].question}"
    )
    assert inquiries("x", "skis")[1].question == "Are there skis in this image?"
    assert inquiries("x", "apple")[1].question == "Is there an apple in this image?"


def test_a_judge_that_fails_half_way_is_not_asked_again_what_it_has_answered(coco, tmp_path):
    images, _ = read_throne(coco)
    table = {"dog": YES, "cat": NO, "tie": YES}
    whole = throne(describe_as("x"), [Scripted("j", table)], images, CLASSES)

    folder, first = tmp_path / "journal", Scripted("j", table, breaks_after=11)
    journal = Journal(folder)
    with pytest.raises(DataError, match="the judge is gone"):
        throne(describe_as("x"), [first], images, CLASSES, journal=journal)
    journal.close()
    with (folder / "0.jsonl").open("a") as file:
        file.write('["cut sho')  # as a killed process leaves it

    second, generate = Scripted("j", table), describe_as("x")
    journal = Journal(folder)
    assert journal.loaded == 2 + 11
    result = throne(generate, [second], images, CLASSES, journal=journal)
    journal.close()
    assert generate.calls == []
    assert len(first.asked) + len(second.asked) == 2 * 3 * 3
    assert result.scores == whole.scores
    again = Scripted("j", table, breaks_after=0)
    throne(describe_as("x"), [again], images, CLASSES, journal=Journal(folder))
    # Another judge's replies are not this one's.
    other = Scripted("k", table, breaks_after=0)
    with pytest.raises(DataError, match="gone"):
        throne(describe_as("x"), [other], images, CLASSES, journal=Journal(folder))


def test_an_empty_description_is_judged_and_counted(coco):
    images, mentions = read_chair(coco)
    assert chair(describe_as(" "), images, mentions).details["empty_replies"] == 2
    judge = Scripted("j", {"dog": NO, "cat": ["", "no", "no"], "tie": NO})
    result = throne(describe_as(""), [judge], images, CLASSES)
    assert result.details["empty_replies"] == 2
    assert result.details["evasive_replies"] == 2  # an empty reply of a judge is no vote
    assert result.scores["overall_recall"] == 0


def test_a_judge_that_says_too_little_is_told(coco):
    class Mute:
        name = "mute"

        def __call__(self, questions: Sequence[Inquiry]) -> list[str]:
            return ["yes"]

    images, _ = read_throne(coco)
    with pytest.raises(DataError, match="'mute' gave fewer replies"):
        throne(describe_as("x"), [Mute()], images, CLASSES)
    with pytest.raises(DataError, match="at least one judge"):
        throne(describe_as("x"), [], images, CLASSES)


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[Any]]]:
    """A chat endpoint that answers "Yes." twice and then breaks."""
    seen: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("Authorization"), body))
            self.send_response(200 if len(seen) < 3 else 500)
            self.end_headers()
            reply = {"choices": [{"message": {"role": "assistant", "content": "Yes."}}]}
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", seen
    server.shutdown()
    server.server_close()


def test_an_endpoint_judges_and_its_failure_says_what_to_do(endpoint, monkeypatch):
    url, seen = endpoint
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge = make_judge(f"{url}#some-model")
    assert isinstance(judge, EndpointJudge)
    replies = judge(inquiries("A dog.", "dog"))
    assert (next(replies), next(replies)) == ("Yes", "Yes")
    with pytest.raises(DataError, match=r"500.*with --json .* replies so far are kept"):
        next(replies)
    path, authorization, body = seen[0]
    assert (path, authorization) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["temperature"]) == ("some-model", 0)
    assert body["messages"][0]["content"] == inquiries("A dog.", "dog")[0].prompt
    with pytest.raises(DataError, match="name the model too"):
        make_judge(url)


def test_a_sequence_model_is_a_judge(tmp_path):
    import tokenizers
    import torch
    import transformers

    import cafe.model  # noqa: F401  (before transformers, where torchvision does not fit torch)

    torch.manual_seed(0)
    words = tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "yes": 3}, "<unk>")
    core = tokenizers.Tokenizer(words)
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = transformers.T5Config(
        vocab_size=4, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = make_judge(str(tmp_path))
    assert isinstance(judge, SequenceJudge)
    replies = list(judge([one for _ in range(30) for one in inquiries("A dog.", "dog")]))
    assert len(replies) == 90
    assert len(set(replies[::3])) == 1
    with pytest.raises(DataError, match="cannot be loaded"):
        next(iter(SequenceJudge(str(tmp_path / "nothing"))(inquiries("x", "dog"))))
