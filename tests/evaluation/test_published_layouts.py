"""Retrieval, captioning, VQA and MMEB from folders in the hub's layout, made here."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cafe.data.formats.mmeb import Ranked
from cafe.errors import DataError
from cafe.evaluation.datasets.rows import local_image, read_rows
from cafe.evaluation.journal import Journal
from cafe.evaluation.mmeb.groups import IMAGE, VIDEO, VISDOC
from cafe.evaluation.mmeb.leaderboard import leaderboard_report
from cafe.evaluation.mmeb.tasks import mmeb_documents, mmeb_images
from cafe.evaluation.tasks.caption import captioning
from cafe.evaluation.tasks.ranking import rank_candidates
from cafe.evaluation.tasks.retrieval import captioned_images, retrieval
from cafe.evaluation.tasks.vqa import INSTRUCTION, read_vqa, vqa
from cafe.media import open_image
from cafe.model.teacher_forced import AnswerScore, TeacherForcedScores
from cafe.types import Example, Image, Message, content_key, user

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def image_record(path: Path, colour: str) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (4, 4), COLOURS[colour]).save(path)
    return {"bytes": path.read_bytes(), "path": path.name}


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def seen(inputs: Sequence[Any]) -> np.ndarray:
    """Embeds by colour: that of the image's first pixel, or the first colour word of the text."""
    rows = []
    for value in inputs:
        parts = (value,) if isinstance(value, str | Image) else value[0].content
        row = np.full(3, 1e-3)
        for part in parts:
            if isinstance(part, Image):
                row += np.array(open_image(part).getpixel((0, 0))) / 255
            else:
                row += [float(name in str(part)) for name in COLOURS]
        rows.append(row / np.linalg.norm(row))
    return np.array(rows, dtype=np.float32)


# ---------------------------------------------------------------- rows


@pytest.fixture
def coco5k(tmp_path: Path) -> Path:
    """Three images; "green" has one caption, and the second image misleads."""
    captions = [["a red thing", "very red"], ["a blue lie", "green", "green too"], ["blue"]]
    rows = [
        {
            "image": image_record(tmp_path / f"{c}.png", c), "caption": texts, "sentids": [0],
            "filename": f"{c}.jpg", "split": "test",
        }
        for c, texts in zip(COLOURS, captions, strict=True)
    ]  # fmt: skip
    folder = tmp_path / "coco"
    table(folder / "data" / "test-00000-of-00002.parquet", rows[:2])
    table(folder / "data" / "test-00001-of-00002.parquet", rows[2:])
    table(folder / "data" / "train-00000-of-00001.parquet", rows[:1])
    return folder


def test_retrieval_counts_any_caption_of_a_image_and_all_captions(coco5k):
    images = list(captioned_images(coco5k))
    assert [(p.id, len(p.captions)) for p in images] == [
        ("red.jpg", 2),
        ("green.jpg", 3),
        ("blue.jpg", 1),
    ]
    result = retrieval(seen, iter(images))
    # green finds one of its own; blue's own caption ties with green's lie: a miss.
    assert result.scores["image_to_text_recall@1"] == pytest.approx(2 / 3)
    assert result.scores["image_to_text_recall@5"] == 1
    # The lie finds blue first, green last but with the others at 0 tied: rank 3.
    assert result.scores["text_to_image_recall@1"] == pytest.approx(5 / 6)
    assert result.items["caption_hits@1"].tolist() == [2, 2, 1]
    assert result.ids == ("red.jpg", "green.jpg", "blue.jpg")
    limited = list(captioned_images(coco5k, limit=2))
    assert len(limited) == 2


def test_images_come_block_by_block(coco5k, monkeypatch):
    images = list(captioned_images(coco5k))
    whole = retrieval(seen, images)
    monkeypatch.setattr("cafe.evaluation.tasks.retrieval.IMAGES_PER_BLOCK", 2)
    sizes = []

    def encode(inputs: Sequence[Any]) -> np.ndarray:
        sizes.append(len(inputs))
        return seen(inputs)

    assert retrieval(encode, images).scores == whole.scores
    assert sizes == [2, 5, 1, 1]


def test_bad_rows_are_told(coco5k, tmp_path):
    twice = [*captioned_images(coco5k), *captioned_images(coco5k)]
    with pytest.raises(DataError, match=r"two samples have the id 'red\.jpg'"):
        retrieval(seen, twice)
    table(tmp_path / "v" / "a.parquet", [{"image": image_record(tmp_path / "p.png", "red"),
                                          "caption": ["a"], "cocoid": 5}] * 2)  # fmt: skip
    with pytest.raises(DataError, match="v, row 1: cocoid '5' is that of row 0 too; remove one"):
        list(captioned_images(tmp_path / "v"))
    with pytest.raises(DataError, match="no parquet file"):
        next(read_rows(_made(tmp_path / "none"), "test"))
    with pytest.raises(DataError, match="no such folder, and not the name"):
        next(read_rows(tmp_path / "gone", "test"))
    table(tmp_path / "x" / "a.parquet", [{"image": None, "caption": ["a"]}])
    with pytest.raises(DataError, match="a row has no image; its columns are caption, image"):
        list(captioned_images(tmp_path / "x"))
    table(tmp_path / "y" / "a.parquet", [{"image": {"bytes": None, "path": "b.png"},
                                          "caption": ["a"]}])  # fmt: skip
    with pytest.raises(DataError, match=r"b\.png: no such image"):
        list(captioned_images(tmp_path / "y"))
    table(tmp_path / "z" / "a.parquet", [{"image": image_record(tmp_path / "p.png", "red"),
                                          "caption": []}])  # fmt: skip
    with pytest.raises(DataError, match="has no caption"):
        list(captioned_images(tmp_path / "z"))
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "a.parquet").write_text("nothing")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        list(read_rows(tmp_path / "w", "test"))
    with pytest.raises(DataError, match="outside the folder"):
        local_image(tmp_path, "../x.png", "row 1")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_rows_of_several_splits_are_never_mixed(tmp_path: Path):
    for split in ("train", "validation"):
        table(tmp_path / "data" / f"{split}-00000-of-00001.parquet", [{"split": split}])
    assert [row["split"] for row in read_rows(tmp_path, "validation")] == ["validation"]
    with pytest.raises(DataError, match="no parquet file of split 'test'; there are train, valid"):
        list(read_rows(tmp_path, "test"))
    (tmp_path / "data" / "validation-00000-of-00001.parquet").unlink()
    assert [row["split"] for row in read_rows(tmp_path, "test")] == ["train"]


def test_folders_that_are_links_are_read(tmp_path: Path):
    """The folder itself, one of rows, one of images; and files, as in a cache of the hub."""
    blobs = tmp_path / "blobs"
    image_record(blobs / "a.png", "red")
    table(blobs / "rows" / "test.parquet", [{"image": "images/é.png", "caption": ["red"]}])
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "images").mkdir()
    (tmp_path / "real" / "data").symlink_to(blobs / "rows")
    (tmp_path / "real" / "images" / unicodedata.normalize("NFD", "é.png")).symlink_to(
        blobs / "a.png"
    )
    (tmp_path / "data").symlink_to(tmp_path / "real")
    (shown,) = captioned_images(tmp_path / "data")
    assert open_image(shown.image).getpixel((0, 0)) == COLOURS["red"]


def test_a_hub_name_gives_the_same_rows_and_its_failure_says_what_to_do(coco5k, monkeypatch):
    import datasets

    rows = list(read_rows(coco5k, "test"))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.List(datasets.Value("string")),
            "sentids": datasets.List(datasets.Value("int64")),
            "filename": datasets.Value("string"),
            "split": datasets.Value("string"),
        }
    )
    stored = datasets.Dataset.from_list(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: stored)
    assert list(read_rows("somebody/coco", "test", 2)) == rows[:2]

    def offline(name: str, split: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"cannot be loaded from the hub \(no network\).*--data"):
        next(read_rows("somebody/coco", "test"))


def test_captioning_compares_with_all_references(coco5k):
    images = list(captioned_images(coco5k))
    replies = {"red.jpg": "Very red.", "green.jpg": "", "blue.jpg": "blue"}
    by_image = {content_key(p.image): replies[p.id] for p in images}
    result = captioning(
        lambda asked, _: [by_image[content_key(c[0].content[0])] for c in asked], images
    )
    # 3 of 3 words are right; the nearest references have 2, 1 and 1: the empty one is short by one.
    assert result.scores["bleu1"] == pytest.approx(np.exp(1 - 4 / 3))
    assert result.scores["cider_d"] > 0
    assert result.items["cider_d"][1] == 0
    assert result.details["empty_replies"] == 1
    assert result.ids == tuple(replies)


# ---------------------------------------------------------------- VQA


def never(examples: Sequence[Example]) -> list[TeacherForcedScores]:
    return [
        TeacherForcedScores(None, None, (AnswerScore(1.0, 1, False),) * len(e.dialogues))
        for e in examples
    ]


def test_vqa_is_the_soft_accuracy_of_ten_people_or_an_exact_match(tmp_path):
    image = image_record(tmp_path / "a.png", "red")
    people = ["red"] * 2 + ["dark red"] * 8
    rows = [
        {"question_id": 1, "question": "Colour?", "answers": people, "image": image},
        {"question_id": 2, "question": "Count?", "answers": ["two"] * 10, "image": image},
        {"question_id": 3, "question": "Empty?", "answers": ["x"] * 10, "image": image},
    ]
    table(tmp_path / "set" / "data" / "validation-0.parquet", rows)
    asked: list[str] = []

    def generate(conversations: Sequence[tuple[Message, ...]], _: int) -> list[str]:
        asked.extend(c[0].text for c in conversations)
        return ["Red.", "2", " "]

    result = vqa(never, generate, read_vqa(tmp_path / "set"))
    # Two of ten agree: 0.6; "2" is "two"; nothing is wrong.
    assert result.items["accuracy"].tolist() == pytest.approx([0.6, 1.0, 0.0])
    assert result.scores["vqa_accuracy"] == pytest.approx(1.6 / 3)
    assert result.details["empty_replies"] == 1
    assert asked[0] == "Colour?" + INSTRUCTION
    table(tmp_path / "one" / "a.parquet", [{"question": "?", "answer": "A dog", "image": image}])
    one = vqa(never, lambda c, _: ["dog"], read_vqa(tmp_path / "one"))
    assert one.scores["vqa_accuracy"] == 1
    table(tmp_path / "bad" / "a.parquet", [{"question": "?", "answers": [""], "image": image}])
    with pytest.raises(DataError, match="question '0' has no answer"):
        list(read_vqa(tmp_path / "bad"))
    table(tmp_path / "twice" / "a.parquet", [rows[0], rows[1] | {"question_id": 1}])
    with pytest.raises(DataError, match="row 1: question_id '1' is that of row 0 too; remove one"):
        list(read_vqa(tmp_path / "twice"))
    table(tmp_path / "gone" / "a.parquet", [rows[0] | {"image": {"bytes": None, "path": "b.png"}}])
    with pytest.raises(DataError, match=r"b\.png: no such image \(question '1'\); download"):
        list(read_vqa(tmp_path / "gone"))


# ---------------------------------------------------------------- candidates


def ranked(name: str, query: str, candidates: list[str], positives: tuple[int, ...]) -> Ranked:
    return Ranked(name, user(query), tuple(user(c) for c in candidates), positives)


def test_the_place_of_the_positive_means_nothing():
    rng = np.random.default_rng(0)
    names = [f"{a} {b}" for a in COLOURS for b in COLOURS]
    vectors = {name: rng.standard_normal(8) for name in names}

    def encode(inputs: Sequence[Any]) -> np.ndarray:
        rows = np.stack([vectors[str(content_key(i))] for i in inputs])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def hits(seed: int) -> list[bool]:
        order = np.random.default_rng(seed)
        queries = []
        for i, query in enumerate(names):
            shuffled = order.permutation(9).tolist()
            positive = shuffled.index((i + 1) % 9) if i % 2 else shuffled.index(i)
            queries.append(ranked(str(i), query, [names[j] for j in shuffled], (positive,)))
        return rank_candidates(encode, queries).hit.tolist()

    assert hits(0) == hits(1) == hits(2) == [i % 2 == 0 for i in range(9)]


def test_ties_are_misses_whatever_the_place_and_a_copy_of_the_positive_is_none():
    queries = [
        ranked("first", "red", ["red", "red!"], (0,)),
        ranked("last", "red", ["red!", "red"], (1,)),
        ranked("copy", "red", ["red", "blue", "red"], (0,)),
        ranked("two right", "red", ["blue", "green", "red"], (1, 2)),
        ranked("wrong", "red", ["blue", "green"], (0,)),
    ]
    found = rank_candidates(seen, queries)
    assert found.hit.tolist() == [False, False, True, True, False]
    assert found.chance.tolist() == pytest.approx([1 / 2, 1 / 2, 2 / 3, 2 / 3, 1 / 2])


def test_each_distinct_candidate_is_embedded_once():
    count = {"inputs": 0}

    def encode(inputs: Sequence[Any]) -> np.ndarray:
        count["inputs"] += len(inputs)
        return seen(inputs)

    shared = ["red", "green", "blue"]
    rank_candidates(encode, [ranked(str(i), "red", shared, (0,)) for i in range(50)])
    assert count["inputs"] == 50 + 3


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([ranked("a", "red", [], (0,))], "query 'a': the list of candidates is empty"),
        ([ranked("a", "red", ["red"], ())], "its positive is not among the 1 candidates"),
        ([ranked("a", "red", ["red"], (1,))], "its positive is not among the 1 candidates"),
        ([ranked("a", "red", ["red"], (0,))] * 2, "two samples have the id 'a'"),
        ([], "there are no queries"),
    ],
)
def test_bad_candidate_lists_are_told(queries, message):
    with pytest.raises(DataError, match=message):
        rank_candidates(seen, queries)


# ---------------------------------------------------------------- MMEB


@pytest.fixture
def mmeb(tmp_path: Path) -> Path:
    folder = tmp_path / "MMEB-eval"
    image_record(folder / "images" / "VOC2007" / "a.png", "red")
    image_record(folder / "images" / "VOC2007" / "b.png", "green")
    rows = [
        {
            "qry_text": "<|image_1|>\nIdentify the object shown in the image\n",
            "qry_img_path": f"VOC2007/{name}.png",
            "tgt_text": targets,
            "tgt_img_path": ["", ""],
        }
        for name, targets in (("a", ["red", "blue"]), ("b", ["blue", "green"]))
    ]
    table(folder / "VOC2007" / "test-00000-of-00001.parquet", rows)
    text_to_image = {
        "qry_text": "Find me an everyday image that matches the given caption: blue",
        "qry_img_path": "",
        "tgt_text": ["<|image_1|>\nRepresent the given image.\n"] * 2,
        "tgt_img_path": ["VOC2007/a.png", "VOC2007/b.png"],
    }
    table(folder / "MSCOCO_t2i" / "test-00000-of-00001.parquet", [text_to_image])
    return folder


def test_mmeb_measures_what_is_there_and_says_what_is_not(mmeb):
    result = mmeb_images(seen, mmeb)
    # VOC2007: the first right; the second's positive is "blue", the first candidate. The blue
    # query ties between a red and a green image.
    assert result.scores == {"VOC2007": 0.5, "MSCOCO_t2i": 0.0}
    assert result.details["queries"] == {"VOC2007": 2, "MSCOCO_t2i": 1}
    assert len(result.details["missing"]) == 34
    assert result.ids == ("VOC2007:0", "VOC2007:1", "MSCOCO_t2i:0")


def test_mmeb_reads_images_through_links(mmeb, tmp_path):
    whole = mmeb_images(seen, mmeb).scores
    for folder in (mmeb / "images" / "VOC2007", mmeb / "images", mmeb):
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
        assert mmeb_images(seen, mmeb).scores == whole
        folder.unlink()
        (tmp_path / "elsewhere").rename(folder)


def test_mmeb_means_are_plain_means_over_complete_groups(mmeb):
    row = {"qry_text": "red", "qry_img_path": "", "tgt_text": ["red", "blue"],
           "tgt_img_path": ["", ""]}  # fmt: skip
    wrong = row | {"tgt_text": ["blue", "red"]}
    for number, (name, (meta, _)) in enumerate(IMAGE.items()):
        (mmeb / name).mkdir(exist_ok=True)
        for old in (mmeb / name).iterdir():
            old.unlink()
        rows = [row, wrong] if meta == "vqa" else [row] if number % 2 else [wrong]
        table(mmeb / name / "test.parquet", rows)
    scores = mmeb_images(seen, mmeb).scores
    groups = {
        "classification": [m == "classification" for m, _ in IMAGE.values()],
        "vqa": [m == "vqa" for m, _ in IMAGE.values()],
        "grounding": [m == "grounding" for m, _ in IMAGE.values()],
        "ood": [ood for _, ood in IMAGE.values()],
        "all": [True] * 36,
    }
    own = np.array([scores[name] for name in IMAGE])
    for name, chosen in groups.items():
        assert scores[name] == pytest.approx(own[np.array(chosen)].mean()), name
    assert scores["vqa"] == 0.5
    assert [sum(groups["ood"]), len(IMAGE), len(VIDEO), len(VISDOC)] == [16, 36, 18, 24]


def test_a_data_set_that_is_in_the_journal_is_not_measured_again(mmeb, tmp_path):
    def broken(inputs: Sequence[Any]) -> np.ndarray:
        raise DataError("out of memory")

    journal = Journal(tmp_path / "journal")
    whole = mmeb_images(seen, mmeb, journal=journal)
    journal.close()
    again = mmeb_images(broken, mmeb, journal=Journal(tmp_path / "journal"))
    assert again.scores == whole.scores
    with pytest.raises(DataError, match="out of memory"):
        mmeb_images(broken, mmeb)


def test_bad_mmeb_folders_are_told(mmeb, tmp_path):
    (mmeb / "images" / "VOC2007" / "b.png").unlink()
    with pytest.raises(DataError, match=r"VOC2007, row 1: .*b\.png"):
        mmeb_images(seen, mmeb)
    table(mmeb / "VOC2007" / "test-00000-of-00001.parquet",
          [{"qry_text": "x", "qry_img_path": "", "tgt_text": [], "tgt_img_path": []}])  # fmt: skip
    with pytest.raises(DataError, match="a query needs candidates"):
        mmeb_images(seen, mmeb)
    with pytest.raises(DataError, match="none of MMEB's image data sets is there"):
        mmeb_images(seen, _made(tmp_path / "empty"))


@pytest.fixture
def visdoc(tmp_path: Path) -> Path:
    folder = tmp_path / "V2" / "ViDoRe_arxivqa"
    pages = [
        {"corpus-id": i, "image": image_record(tmp_path / f"{c}.png", c)}
        for i, c in enumerate(COLOURS)
    ]
    table(folder / "corpus" / "test-0.parquet", pages)
    queries = [{"query-id": 10, "query": "red and blue"}, {"query-id": 11, "query": "green"}]
    table(folder / "queries" / "test-0.parquet", queries)
    qrels = [
        {"query-id": 10, "corpus-id": 0, "score": 1},
        {"query-id": 10, "corpus-id": 1, "score": 2},
        {"query-id": 10, "corpus-id": 1, "score": 1},
        {"query-id": 11, "corpus-id": 1, "score": 1},
    ]
    table(folder / "qrels" / "test-0.parquet", qrels)
    return folder.parent


def test_documents_are_ranked_against_all_pages_by_linear_ndcg(visdoc):
    result = mmeb_documents(seen, visdoc)
    # Query 10 puts red and blue (grades 1 and 0, tied: the worse first) before green (2).
    worst = 0 + 1 / np.log2(3) + 2 / np.log2(4)
    best = 2 + 1 / np.log2(3)
    assert result.scores["ViDoRe_arxivqa"] == pytest.approx((worst / best + 1) / 2)
    assert result.details["measure"] == "ndcg_linear@5"


def test_pages_and_document_queries_are_there_once(visdoc, tmp_path):
    folder = visdoc / "ViDoRe_arxivqa"
    page = {"corpus-id": 0, "image": image_record(tmp_path / "red.png", "red")}
    twice = [{"query-id": 10, "query": "red"}] * 2
    table(folder / "queries" / "test-0.parquet", twice)
    with pytest.raises(DataError, match="queries: two samples have the id '10'; remove one"):
        mmeb_documents(seen, visdoc)
    table(folder / "corpus" / "test-0.parquet", [page, page])
    with pytest.raises(DataError, match="corpus: two pages have corpus-id '0'; remove one"):
        mmeb_documents(seen, visdoc)
    gone = page | {"image": {"bytes": None, "path": "gone.png"}}
    table(folder / "corpus" / "test-0.parquet", [gone])
    with pytest.raises(DataError, match=r"gone\.png: no such image \(page '0'\); download"):
        mmeb_documents(seen, visdoc)


def test_a_document_query_without_its_page_is_told(visdoc):
    qrels = visdoc / "ViDoRe_arxivqa" / "qrels" / "test-0.parquet"
    table(qrels, [{"query-id": 10, "corpus-id": 0, "score": 1}])
    with pytest.raises(DataError, match=r"qrels: no row names a page for query-id '11'.*add one"):
        mmeb_documents(seen, visdoc)
    table(qrels, [{"query-id": 10, "corpus-id": 7, "score": 1}])
    with pytest.raises(DataError, match=r"names corpus-id '7', which is not in .*add the page"):
        mmeb_documents(seen, visdoc)


def test_the_report_is_the_leaderboards():
    report = leaderboard_report(
        {"image": {"VOC2007": 0.5}, "visdoc": {"ViDoSeek-doc": 0.25}},
        {"VOC2007": 1000, "ViDoSeek-doc": 10},
        {"model_name": "m"},
    )
    assert json.loads(json.dumps(report)) == {
        "metadata": {"model_name": "m"},
        "metrics": {
            "image": {"VOC2007": {"hit@1": 0.5, "num_pred": 1000, "num_data": 1000}},
            "video": {},
            "visdoc": {"ViDoSeek-doc": {"ndcg_linear@5": 0.25, "num_pred": 10, "num_data": 10}},
        },
    }
