"""The bundled world: deterministic, exact, balanced. Answers are recomputed from the truth."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
from PIL import Image

from cafe.data.scenes import (
    CATEGORIES,
    CLASS_NAMES,
    CLASSES,
    PLACES,
    QUESTION_KINDS,
    Scene,
    SceneQuestion,
    caption,
    draw,
    mentioned_classes,
    questions,
    read_truth,
    sample_scene,
    write_scenes,
)
from cafe.data.scenes.classes import ink, plural, sprite
from cafe.data.scenes.world import (
    IMAGE_PIXELS,
    MAX_HIDDEN,
    SIZES,
    has_held_out_pair,
    is_held_out,
    scene_seed,
)
from cafe.errors import DataError
from cafe.types import CAPTION_REQUEST

SCENES = [sample_scene(seed, "test" if seed % 2 else "train") for seed in range(300)]
SINGULARS = {plural(name): name for name in CLASS_NAMES}
NUMBERS = ["zero", "one", "two", "three", "four"]


@cache
def many(split: str) -> list[Scene]:
    """Placing objects takes milliseconds, so all tests of shares use the same scenes."""
    return [sample_scene(seed, split) for seed in range(600)]  # type: ignore[arg-type]


def ask(scene: Scene, count: int = 10) -> list[SceneQuestion]:
    return questions(scene, np.random.default_rng(scene.seed), count)


def all_questions(kind: str) -> list[tuple[Scene, SceneQuestion]]:
    return [(scene, q) for scene in SCENES for q in ask(scene) if q.kind == kind]


def strip_article(text: str) -> str:
    return re.sub(r"^an? ", "", text)


def said_facts(text: str) -> list[tuple[str, str, str]]:
    """(size, class, place) of each object that a statement names, in either word order."""
    names, places = "|".join(CLASS_NAMES), "|".join(PLACES)
    thing, place = rf"a (big|small) ({names})", rf"(?:at|in) the ({places})"
    text = text.lower()
    if re.match(place, text):
        return [(s, k, p) for p, s, k in re.findall(rf"{place} (?:there is )?{thing}", text)]
    return re.findall(rf"{thing} {place}", text)


# --- the object classes


def test_there_are_eighty_classes_in_ten_categories_of_at_least_six():
    assert len(CLASSES) == 80
    assert len(CATEGORIES) == 10
    assert min(len(names) for names in CATEGORIES.values()) >= 6
    assert len({entry.glyph for entry in CLASSES.values()}) == 80
    assert all(len(entry.glyph) == 1 for entry in CLASSES.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat", "cats"),
        ("cherry", "cherries"),
        ("key", "keys"),
        ("bus", "buses"),
        ("peach", "peaches"),
        ("potato", "potatoes"),
        ("maple leaf", "maple leaves"),
    ],
)
def test_plurals(name: str, expected: str):
    assert plural(name) == expected


def test_every_class_has_its_own_image_in_colour():
    images = {sprite(name, 44, 0.0).tobytes() for name in CLASS_NAMES}
    assert len(images) == 80
    for name in CLASS_NAMES:
        assert max(sprite(name, 44, 0.0).size) == pytest.approx(44, abs=1)
    red, green, blue, _ = np.asarray(sprite("frog", 44, 0.0), dtype=int)[22, 22]
    assert green > red > blue  # a missing colour table would draw it black


# --- the world


def test_same_seed_gives_the_same_scene_and_bytes():
    for seed in range(20):
        first, second = sample_scene(seed), sample_scene(seed)
        assert first == second
        assert draw(first).tobytes() == draw(second).tobytes()


@pytest.mark.slow
def test_other_seed_or_split_gives_another_scene():
    images = {draw(scene).tobytes() for scene in many("train")[:100] + many("test")[:100]}
    assert len(images) == 200


def test_data_sets_of_two_seeds_share_no_scene_seed():
    first = {scene_seed(0, index) for index in range(1000)}
    assert first.isdisjoint(scene_seed(1, index) for index in range(1000))


def test_held_out_pairs_are_symmetric_and_about_a_tenth():
    pairs = list(combinations(CLASS_NAMES, 2))
    assert all(is_held_out(a, b) == is_held_out(b, a) for a, b in pairs)
    share = np.mean([is_held_out(a, b) for a, b in pairs])
    assert share == pytest.approx(0.1, abs=0.02)  # 3160 pairs: standard deviation 0.005
    for name in CLASS_NAMES:
        assert any(is_held_out(name, other) for other in CLASS_NAMES)


def test_held_out_pairs_are_in_half_of_the_test_scenes_and_in_no_train_scene():
    assert not any(has_held_out_pair(scene.classes) for scene in many("train"))
    shown = [has_held_out_pair(s.classes) for s in many("test") if len(s.objects) >= 2]
    assert np.mean(shown) == pytest.approx(0.5, abs=0.08)


def test_objects_lie_in_their_places_inside_the_image():
    for scene in SCENES:
        places = [item.place for item in scene.objects]
        assert len(set(places)) == len(places)
        for item in scene.objects:
            middle = PLACES[item.place]
            nearest = min(
                PLACES.values(), key=lambda p: (p[0] - item.x) ** 2 + (p[1] - item.y) ** 2
            )
            assert nearest == middle
            left, top, right, bottom = item.sprite_box
            assert left >= 0
            assert top >= 0
            assert max(right, bottom) <= IMAGE_PIXELS
            assert SIZES[item.size][0] <= item.pixels <= SIZES[item.size][1]
            assert abs(item.angle_degrees) <= 25


def test_counts_and_twins_have_their_shares():
    scenes = many("train") + many("test")
    counts = Counter(len(scene.objects) for scene in scenes)
    for number, share in zip((1, 2, 3, 4), (0.2, 0.3, 0.3, 0.2), strict=True):
        assert counts[number] / len(scenes) == pytest.approx(share, abs=0.04)
    several = [scene for scene in scenes if len(scene.objects) > 1]
    twins = np.mean([len(scene.classes) < len(scene.objects) for scene in several])
    assert twins == pytest.approx(0.12, abs=0.04)


def visible_fractions(scene: Scene) -> list[float]:
    """Slow reference for `hidden_fractions`: paint numbers in order, count what remains."""
    owner = np.full((IMAGE_PIXELS, IMAGE_PIXELS), -1)
    areas = []
    for number, item in enumerate(scene.objects):
        mask = ink(sprite(item.kind, item.pixels, item.angle_degrees))
        left, top, right, bottom = item.sprite_box
        owner[top:bottom, left:right][mask] = number
        areas.append(mask.sum())
    return [(owner == number).sum() / area for number, area in enumerate(areas)]


def test_no_object_is_hidden_beyond_the_bound_yet_some_are_partly():
    visible = [fraction for scene in SCENES for fraction in visible_fractions(scene)]
    assert min(visible) >= 1 - MAX_HIDDEN - 1e-9
    assert np.mean(np.array(visible) < 0.95) > 0.05
    heap = replace(SCENES[0], objects=(replace(SCENES[0].objects[0]),) * 2)
    assert min(visible_fractions(heap)) == 0  # the measure does see a hidden object


# --- language


def test_caption_names_exactly_the_classes_and_facts_of_its_scene():
    for scene in SCENES:
        text = caption(scene, np.random.default_rng(scene.seed))
        assert mentioned_classes(text) == set(scene.classes)
        truth = [(item.size, item.kind, item.place) for item in scene.objects]
        assert sorted(said_facts(text)) == sorted(truth)
        assert text[0].isupper()
        assert text.endswith(".")
        assert f"{scene.background} background" in text or "background" not in text


def test_mentioned_classes_takes_whole_words_plurals_and_the_longest_name():
    assert mentioned_classes("Two CATS and a cupcake; no category.") == {"cat", "cupcake"}
    assert mentioned_classes("maple leaves, a fir tree and cherries") == {
        "maple leaf",
        "fir tree",
        "cherry",
    }
    assert mentioned_classes("a pancake on a leaf") == set()


def test_questions_are_different_and_as_many_as_asked():
    for scene in SCENES:
        found = ask(scene, 8)
        assert len({q.text for q in found}) == len(found) == 8
        assert all(q.answer == q.answer.lower().rstrip(".") for q in found)


def test_question_kinds_have_their_shares():
    counts = Counter(q.kind for scene in SCENES for q in ask(scene, 3))
    assert set(counts) == set(QUESTION_KINDS)
    total = counts.total()
    for kind, share in (("presence", 0.25), ("object", 0.25), ("match", 0.2)):
        assert counts[kind] / total == pytest.approx(share, abs=0.07)


def test_presence_answers_are_true():
    for scene, q in all_questions("presence"):
        match = re.fullmatch(r"Is there (an? .+) in the picture\? Answer yes or no\.", q.text)
        assert match
        name = strip_article(match[1])
        assert name in CLASSES
        assert (match[1][:3] == "an ") == (name[0] in "aeiou")
        assert q.answer == ("yes" if name in [item.kind for item in scene.objects] else "no")


@pytest.mark.parametrize("kind", ["presence", "match"])
def test_yes_and_no_are_balanced(kind: str):
    answers = [q.answer for _, q in all_questions(kind)]
    assert len(answers) > 500
    assert np.mean([answer == "yes" for answer in answers]) == pytest.approx(0.5, abs=0.06)


@pytest.mark.slow
def test_presence_stays_balanced_when_many_are_asked_of_few_objects():
    lone = [scene for scene in (sample_scene(s) for s in range(600)) if len(scene.objects) == 1]
    answers = [q.answer for scene in lone for q in ask(scene, 8) if q.kind == "presence"]
    assert np.mean([answer == "yes" for answer in answers]) == pytest.approx(0.5, abs=0.09)


def test_object_answers_are_true():
    for scene, q in all_questions("object"):
        place = next(name for name in PLACES if name in q.text)
        assert [q.answer] == [item.kind for item in scene.objects if item.place == place]


def test_count_answers_are_true_and_vary():
    answers = Counter()
    for scene, q in all_questions("count"):
        match = re.fullmatch(r"How many (.+) are there\?", q.text)
        assert match
        name = SINGULARS.get(match[1])
        matching = [item for item in scene.objects if name in (None, item.kind)]
        assert name or match[1] == "objects"
        assert q.answer == NUMBERS[len(matching)]
        answers[q.answer] += 1
    assert set(answers) == set(NUMBERS)


def test_relation_answers_are_the_only_object_on_that_side():
    sides = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    found = all_questions("relation")
    assert len(found) > 30
    for scene, q in found:
        match = re.fullmatch(r"What is (left of|right of|above|below) the (.+)\?", q.text)
        assert match
        dx, dy = sides[match[1]]
        (item,) = [o for o in scene.objects if o.kind == match[2]]
        ahead = [(dx * (o.x - item.x) + dy * (o.y - item.y), o.kind) for o in scene.objects]
        (second, _), (first, kind) = sorted(ahead)[-2:]
        assert kind == q.answer
        assert first >= 18
        assert second <= 10


def test_attribute_answers_are_true():
    patterns = {
        "colour": (r"What colour is the (.+)\?", lambda o: CLASSES[o.kind].colour),
        "size": (r"Is the (.+) big or small\?", lambda o: o.size),
        "place": (r"Where is the (.+)\?", lambda o: o.place),
    }
    for kind, (pattern, attribute) in patterns.items():
        for scene, q in all_questions(kind):
            match = re.fullmatch(pattern, q.text)
            assert match
            (item,) = [o for o in scene.objects if o.kind == match[1]]
            assert q.answer == attribute(item)
    assert all(q.answer == scene.background for scene, q in all_questions("background"))


def test_match_answers_are_true_and_wrong_statements_are_near_misses():
    captions = 0
    found = all_questions("match")
    for scene, q in found:
        match = re.fullmatch(r'Does the picture show "(.+)"\? Answer yes or no\.', q.text)
        assert match
        said = said_facts(match[1])
        assert said
        truth = {(item.size, item.kind, item.place) for item in scene.objects}
        wrong = set(said) - truth
        assert q.answer == ("no" if wrong else "yes")
        assert len(wrong) <= 2
        for fact in wrong:
            best = max(sum(a == b for a, b in zip(fact, true, strict=True)) for true in truth)
            assert best == 2 or len(wrong) == 2 or fact[2] in {item.place for item in scene.objects}
        captions += match[1].endswith(".")
    assert captions / len(found) == pytest.approx(0.5, abs=0.06)


# --- files and streams


def test_written_folder_holds_what_the_scenes_say(tmp_path):
    out, seen = tmp_path / "scenes", []
    write_scenes(out, 12, seed=5, split="test", questions_per_scene=4, progress=seen.append)
    assert seen == list(range(1, 13))
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
    captions = json.loads((out / "captions.json").read_text())
    asked = json.loads((out / "questions.json").read_text())
    truths = read_truth(out)
    assert len(captions) == len(asked) == len(truths) == 12
    for index, truth in enumerate(truths):
        assert truth.scene == sample_scene(scene_seed(5, index), "test")
        assert truth.image == captions[index]["image"] == f"images/{index:06d}.png"
        with Image.open(out / truth.image) as image:
            assert image.tobytes() == draw(truth.scene).tobytes()
        assert captions[index]["conversations"] == [
            {"from": "human", "value": f"<image>\n{CAPTION_REQUEST}"},
            {"from": "gpt", "value": truth.caption},
        ]
        turns = asked[index]["conversations"]
        assert asked[index]["id"] == f"{truth.id}-questions"
        assert len(asked[index]["kinds"]) == len(turns) / 2 == 4
        assert [("<image>" in turn["value"]) for turn in turns] == [True] + [False] * 7
        assert all((a["from"], b["from"]) != ("gpt", "gpt") for a, b in pairwise(turns))


@pytest.mark.parametrize("processes", [1, 2])
def test_same_seed_writes_the_same_bytes(tmp_path, processes):
    done = []
    write_scenes(tmp_path / "one", 4, seed=1)
    write_scenes(tmp_path / "two", 4, seed=1, processes=processes, progress=done.append)
    assert done == [1, 2, 3, 4]
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_folder_with_content_is_refused_and_untouched(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(DataError, match="not an empty folder"):
        write_scenes(tmp_path, 1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "scenes", 3, seed=0, progress=stop)
    assert not list(tmp_path.iterdir())


def test_bad_truth_names_file_and_line(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_truth(tmp_path)
    (tmp_path / "truth.jsonl").write_text('{"id": "0"}\n')
    with pytest.raises(DataError, match=r"truth\.jsonl, line 1"):
        read_truth(tmp_path)
