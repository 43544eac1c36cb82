"""Arguments reach the functions behind the verbs, and errors are one line.

The verbs run in this process, with stand-ins for the functions that they call.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest

from cafe.errors import CafeError
from cafe.recipes import Recipe, load_recipe

RECIPE = """\
model: tiny
output_dir: out
data: [{path: captions.json}]
batch: {examples: 8}
optimizer: {learning_rate: 1e-3}
schedule: {steps: 2}
"""


@pytest.fixture
def cafe(command_line: Any):
    return command_line


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch):
    """Replaces a function of a module by `function` and returns the calls that it gets."""

    def install(target: str, function: Any = None) -> list[tuple[tuple, dict]]:
        calls: list[tuple[tuple, dict]] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            return function(*args, **kwargs) if function else None

        monkeypatch.setattr(target, record)
        return calls

    return install


class FakeModel:
    """What `CAFe.from_pretrained` returns here."""

    asked: Any = None

    @classmethod
    def from_pretrained(cls, name: str) -> FakeModel:
        model = cls()
        model.name = name  # type: ignore[attr-defined]
        return model

    def generate(self, messages: Any, *, stream: bool, **settings: Any) -> Any:
        FakeModel.asked = (messages, stream, settings)
        return iter(["A red", " mug."]) if stream else "A red mug."


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cafe.model.vlm.CAFe", FakeModel)


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(RECIPE)
    return str(path)


def raising(error: BaseException):
    def function(*_: Any, **__: Any) -> None:
        raise error

    return function


def test_demo(cafe, stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = stand_in("cafe.demo.run_demo")
    assert cafe("demo")[0] == 0
    assert cafe("demo", "--out", "x", "--steps", "5", "--seed", "3")[0] == 0
    assert calls == [((Path("demo"), None, 0), {}), ((Path("x"), 5, 3), {})]
    assert cafe("demo", "--steps", "0")[0] == 2
    assert len(calls) == 2


def test_a_second_demo_leaves_the_first_alone(cafe, stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for taken in ("demo", "demo-2"):
        Path(taken).mkdir()
    calls = stand_in("cafe.demo.run_demo")
    assert cafe("demo")[0] == 0
    assert calls == [((Path("demo-3"), None, 0), {})]


def test_train_takes_overrides_before_and_after_options(cafe, stand_in, recipe_file):
    result = SimpleNamespace(model_dir=Path("out/model"), log_path=Path("out/log.jsonl"))
    calls = stand_in("cafe.training.run.train", lambda *_, **__: result)
    code, out, _ = cafe("train", recipe_file, "seed=1", "--resume", "batch.chunk=4")
    assert (code, out) == (0, "the model is in out/model, the log in out/log.jsonl\n")
    ((recipe,), keywords) = calls[0]
    assert isinstance(recipe, Recipe)
    assert (recipe.seed, recipe.batch.chunk, keywords) == (1, 4, {"resume": True})


def test_a_misspelt_override_is_one_line_and_nothing_is_trained(cafe, stand_in, recipe_file):
    calls = stand_in("cafe.training.run.train")
    code, out, err = cafe("train", recipe_file, "batch.exmples=4")
    assert (code, out, calls) == (2, "", [])
    assert err == (
        "error: override 'batch.exmples=4': unknown recipe key batch.exmples; "
        "did you mean batch.examples?\n"
    )


def test_generate_streams_the_answer(cafe, fake_model, tmp_path):
    image = tmp_path / "a.png"
    PIL.Image.new("RGB", (4, 3), "red").save(image)
    code, out, _ = cafe("generate", "tiny", "--image", str(image), "What is it?")
    assert (code, out) == (0, "A red mug.\n")
    (message,), stream, settings = FakeModel.asked
    assert (message.role, message.text, stream) == ("user", "What is it?", True)
    assert settings == {"max_new_tokens": 256, "best_of": None}, "greedy"
    assert message.content[0].source.size == (4, 3)


def test_generate_gives_the_best_of_several_answers(cafe, fake_model):
    code, out, _ = cafe("generate", "tiny", "What is it?", "--best-of", "8", "--temperature", "0.9")
    assert (code, out) == (0, "A red mug.\n")
    _, stream, settings = FakeModel.asked
    assert not stream
    assert settings == {"max_new_tokens": 256, "best_of": 8, "temperature": 0.9}


def test_generate_names_a_broken_image_before_the_model_loads(cafe, stand_in, tmp_path):
    loads = stand_in("cafe.model.vlm.CAFe.from_pretrained")
    code, out, err = cafe("generate", "tiny", "--image", str(tmp_path / "no.png"), "What?")
    assert (code, out) == (2, "")
    assert err == f"error: image '{tmp_path / 'no.png'}': no such file\n"
    assert loads == []


def test_data_scenes(cafe, monkeypatch):
    calls: list[tuple] = []

    def write_scenes(
        out: Path, count: int, seed: int, split: str, progress: Any, negatives_per_scene: int
    ) -> None:
        calls.append((out, count, seed, split, negatives_per_scene))
        progress(count)

    monkeypatch.setattr("cafe.data.scenes.write_scenes", write_scenes)
    argv = ("data", "scenes", "--out", "d", "--count", "3", "--seed", "7")
    assert cafe(*argv)[:2] == (0, "3 scenes in d\n")
    assert cafe(*argv, "--split", "test", "--negatives", "2")[0] == 0
    assert calls == [(Path("d"), 3, 7, "train", 0), (Path("d"), 3, 7, "test", 2)]
    assert cafe(*argv, "--split", "val")[0] == 2


def test_an_expected_error_is_one_line_and_exit_code_2(cafe, stand_in):
    stand_in("cafe.demo.run_demo", raising(CafeError("first\nsecond")))
    assert cafe("demo") == (2, "", "error: first second\n")


@pytest.mark.parametrize("argv", [("--debug", "demo"), ("demo",)])
def test_debug_shows_the_traceback(cafe, stand_in, monkeypatch, argv):
    stand_in("cafe.demo.run_demo", raising(CafeError("first")))
    if "--debug" not in argv:
        monkeypatch.setenv("CAFE_DEBUG", "1")
    with pytest.raises(CafeError, match="first"):
        cafe(*argv)


def test_an_unexpected_error_is_never_hidden(cafe, stand_in):
    stand_in("cafe.demo.run_demo", raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        cafe("demo")


@pytest.mark.parametrize("verb", ["embed", "index", "train", "data inspect"])
def test_a_name_too_long_for_a_file_is_one_line(command_line, verb, tmp_path):
    name = "a" * 300 + ".json"
    model, to = {"embed": (["tiny"], ["--out", tmp_path / "o.parquet"]),
                 "index": (["tiny"], ["--to", tmp_path / "i"])}.get(verb, ([], []))  # fmt: skip
    code, _, err = command_line(*verb.split(), *model, name, *to)
    assert code == 2
    assert err.count("\n") == 1, err
    assert "is not a file: its name is too long" in err


def test_ctrl_c_is_exit_code_130_and_one_line(cafe, stand_in, tmp_path: Path):
    stand_in("cafe.demo.run_demo", raising(KeyboardInterrupt()))
    assert cafe("demo") == (130, "", "stopped by Ctrl-C\n")
    stand_in("cafe.retrieval.indexing.build_index", raising(KeyboardInterrupt()))
    assert cafe("index", "tiny", tmp_path, "--to", tmp_path / "i") == (
        130,
        "",
        "stopped by Ctrl-C; what is finished is kept, and the same command goes on from there\n",
    )


def test_ctrl_c_is_not_lost_where_python_drops_exceptions(cafe, stand_in):
    class Busy:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def busy(*_: Any) -> None:
        one = Busy()
        del one
        for _ in range(100):  # five seconds, were it lost
            time.sleep(0.05)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stand_in("cafe.demo.run_demo", busy)
        assert cafe("demo") == (130, "", "stopped by Ctrl-C\n")
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_shipped_recipe_is_copied_first(cafe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = cafe("train", "smolvlm-256m.yaml")
    assert code == 2
    source, target = err.strip().rpartition("cp ")[2].split()
    assert (Path(source).name, target) == ("smolvlm-256m.yaml", "smolvlm-256m.yaml")
    Path(target).write_bytes(Path(source).read_bytes())
    assert load_recipe(target).model == "HuggingFaceTB/SmolVLM-256M-Instruct"
    code, _, err = cafe("train", "gone.yaml")
    assert code == 2
    assert "gone.yaml: cannot be read" in err


def test_messages_of_a_job_are_shown_on_stderr_once(cafe, stand_in):
    job = logging.getLogger("cafe.demo.run")

    def run_demo(*_: Any) -> None:
        job.debug("a detail")
        job.info("half of it is done")
        job.warning("one image was skipped")

    stand_in("cafe.demo.run_demo", run_demo)
    for _ in range(2):
        assert cafe("demo") == (0, "", "half of it is done\none image was skipped\n")


def test_a_library_user_sees_no_message_unless_logging_is_configured():
    warn = "import logging, cafe.errors; {}logging.getLogger('cafe.demo').warning('skipped')"
    for configure, shown in (("", ""), ("logging.basicConfig(); ", "WARNING:cafe.demo:skipped\n")):
        code = warn.format(configure)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", shown)


@pytest.mark.parametrize(
    ("verb", "kept"), [("doctor", 1), ("generate", 1), ("serve", 0), ("ui", 0)]
)
def test_a_server_gives_memory_back_and_other_verbs_keep_it(
    cafe, monkeypatch, verb: str, kept: int
):
    calls: list[int] = []
    monkeypatch.setattr("cafe.cli.keep_memory", lambda: calls.append(1))
    code, _, _ = cafe(verb, "--no-such-option")  # begun, and no more
    assert (code, len(calls)) == (2, kept)
