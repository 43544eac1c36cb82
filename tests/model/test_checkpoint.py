"""One directory, read by this library, by plain transformers and by plain sentence-transformers."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cafe.errors import CheckpointError, FamilyError
from cafe.media import open_image
from cafe.model.checkpoint.directory import save_checkpoint
from cafe.model.tiny import tiny_model
from cafe.model.vlm import CAFe
from cafe.types import Image
from helpers.images import LFS, noise

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "embedding_template.jinja",
    "cafe_protocol.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "2_Normalize/config.json",
}


SQUARE, WIDE = noise(1), noise(2, 120, 50)
MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {
        "role": "user",
        "content": [{"type": "image", "image": WIDE}, {"type": "text", "text": "What is it?"}],
    },
]
TALK = [
    {"role": "user", "content": [{"type": "text", "text": "Where is the cat?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "On the mat."}]},
]
INPUTS = [
    "a red cat",
    SQUARE,
    {"text": "what is this", "image": SQUARE},
    {"image": WIDE, "text": "what is that"},
    {"text": "which", "image": [SQUARE, WIDE]},
    "yes " * 40,
    "é 猫 🐈",
]


@pytest.fixture(scope="module")
def untied_dir(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head is not its token embedding."""
    torch.manual_seed(1)
    shape = {"vision_layers": 1, "vision_width": 64, "language_layers": 2, "language_width": 64}
    model = tiny_model(small_model.processor, **shape)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    directory = tmp_path_factory.mktemp("untied") / "model"
    CAFe(model, small_model.processor).save_pretrained(directory)
    return directory


@pytest.fixture(params=["tied", "untied"])
def directory(request: pytest.FixtureRequest, small_dir: Path) -> Path:
    return small_dir if request.param == "tied" else request.getfixturevalue("untied_dir")


def test_the_directory_holds_what_every_tool_reads(small_dir: Path):
    assert {p.relative_to(small_dir).as_posix() for p in small_dir.rglob("*.*")} == FILES


def test_one_chat_template_is_the_processors_and_the_old_named_one_is_removed(
    small_model: Any, tmp_path: Path
):
    """vLLM refuses a processor that has several."""
    from transformers import AutoProcessor

    old = tmp_path / "additional_chat_templates"
    old.mkdir()
    (old / "embedding.jinja").write_text("an older version's")
    small_model.save_pretrained(tmp_path)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path).chat_template, str)
    assert not old.exists()


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_have_the_names_of_the_hub(
    small_model: Any, small_dir: Path, tmp_path: Path, loaded: bool, sharded: bool
):
    """Written by a model that was built, by one that was loaded, and from gathered weights."""
    model = CAFe.from_pretrained(small_dir, device="cpu") if loaded else small_model
    weights = model.model.state_dict() if sharded else None
    save_checkpoint(model.model, model.processor, model.collator, tmp_path, weights)
    names = load_file(tmp_path / "model.safetensors").keys()
    starts = {"image_newline", "language_model.model.", "multi_modal_projector."}
    starts |= {"vision_tower.vision_model."}
    assert {start for n in names for start in starts if n.startswith(start)} == starts
    assert all(n.startswith(tuple(starts)) for n in names)


def test_flattened_names_are_still_read_and_saved_under_the_hubs(small_dir: Path, tmp_path: Path):
    old = tmp_path / "old"
    shutil.copytree(small_dir, old)
    tensors = load_file(old / "model.safetensors")
    flat = {n.replace("vision_tower.vision_model.", "vision_tower."): t for n, t in tensors.items()}
    assert flat.keys() != tensors.keys()
    save_file(flat, old / "model.safetensors", metadata={"format": "pt"})
    read = CAFe.from_pretrained(old, device="cpu")
    read.save_pretrained(tmp_path / "new")
    saved = load_file(tmp_path / "new" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[n], tensors[n]) for n in tensors)


# ------------------------------------------------------------------ transformers


def test_plain_transformers_gives_the_same_logits(directory: Path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    ours = CAFe.from_pretrained(directory, device="cpu")
    plain, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(directory)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tied = plain.lm_head.weight is plain.model.language_model.embed_tokens.weight
    assert tied == ("untied" not in str(directory))
    inputs = processor.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    from cafe.model.rows.inputs import as_conversation

    rows, vision = ours.collator.prompt_rows([as_conversation(MESSAGES)])
    assert rows.input_ids.tolist() == inputs["input_ids"].tolist()
    with torch.inference_mode():
        logits = ours.lm_head(ours(rows, vision))
        expected = plain.eval()(**inputs).logits
    assert float((logits - expected).abs().max()) <= 1e-5
    assert float(expected.std()) > 0.1


def test_plain_transformers_generates_the_same_answer(directory: Path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    plain = AutoModelForImageTextToText.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    inputs = processor.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = plain.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ours = CAFe.from_pretrained(directory, device="cpu")
    assert ours.generate(MESSAGES, max_new_tokens=12) == answer.strip()
    # A random model with a tied head repeats its last token, a line end; the other one babbles.
    assert answer.strip() or "untied" not in str(directory)


# ------------------------------------------------------------------ sentence-transformers


def sentence_transformer(directory: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(directory), device="cpu", trust_remote_code=False)


def test_plain_sentence_transformers_gives_equal_embeddings(directory: Path):
    ours, theirs = CAFe.from_pretrained(directory, device="cpu"), sentence_transformer(directory)
    assert theirs.get_embedding_dimension() == ours.embedding_dimension
    expected = ours.encode(INPUTS)
    assert np.abs(theirs.encode(INPUTS) - expected).max() <= 1e-5, "mixed in one list"
    for given, embedding in zip(INPUTS, expected, strict=True):
        assert np.abs(theirs.encode(given) - embedding).max() <= 1e-5
    # The inputs differ, so equality says something.
    similarity = expected @ expected.T
    assert (similarity - np.eye(len(INPUTS))).max() < 1 - 1e-4


def pixels(kind: str) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """An unusual image, and the plain one that sentence-transformers embeds in its place."""
    stream = io.BytesIO()
    opaque = WIDE.convert("L").point(lambda level: 255 if level > 100 else 0)
    match kind:
        case "turned":
            exif = PIL.Image.Exif()
            exif[0x0112] = 6
            WIDE.save(stream, "PNG", exif=exif)
            return PIL.Image.open(stream), WIDE
        case "16 bit" | "32 bit":
            levels = np.arange(50 * 120).reshape(50, 120) * 10
            deep = PIL.Image.fromarray(levels.astype(np.uint16 if kind == "16 bit" else np.int32))
            return deep, PIL.Image.fromarray(levels.clip(max=255).astype(np.uint8)).convert("RGB")
        case "palette":
            WIDE.quantize(16).save(stream, "PNG", transparency=3)
            mixed = PIL.Image.open(stream)
        case "colour":
            WIDE.save(stream, "PNG", transparency=WIDE.getpixel((0, 0)))
            mixed = PIL.Image.open(stream)
        case _:
            mixed = WIDE.convert("RGBA")
            mixed.putalpha(opaque)
            mixed = mixed.convert(kind)
    white = PIL.Image.new("RGBA", mixed.size, "white")
    return mixed, PIL.Image.alpha_composite(white, mixed.convert("RGBA")).convert("RGB")


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "colour", "turned", "16 bit", "32 bit"])
def test_plain_sentence_transformers_embeds_unusual_images_as_documented(
    kind: str, small_dir: Path, small_model: Any
):
    """Transparent ones alike; deep and turned ones when cafe has opened them."""
    theirs = sentence_transformer(small_dir)
    image, seen_there = pixels(kind)
    ours = small_model.encode(image)
    there = theirs.encode([image])[0]
    assert np.abs(there - small_model.encode(seen_there)).max() <= 1e-5
    alike = np.abs(there - ours).max() <= 1e-5
    assert alike == (kind not in {"turned", "16 bit", "32 bit"})
    assert np.abs(theirs.encode([open_image(Image(image))])[0] - ours).max() <= 1e-5


def test_plain_sentence_transformers_reads_messages_alike(small_dir: Path, small_model: Any):
    theirs = sentence_transformer(small_dir)
    both = theirs.encode([MESSAGES, TALK])
    assert np.abs(both - small_model.encode([MESSAGES, TALK])).max() <= 1e-5
    assert np.abs(theirs.encode([MESSAGES])[0] - small_model.encode(MESSAGES)).max() <= 1e-5


def test_messages_among_other_inputs_are_refused_there_not_misread(small_dir: Path):
    """sentence-transformers 6.2 would have embedded an empty text in their place."""
    with pytest.raises(Exception, match="cannot mix chat messages with other inputs"):
        sentence_transformer(small_dir).encode(["a red cat", MESSAGES])


def test_the_order_of_keys_and_of_texts_before_images_means_nothing(small_model: Any):
    first = small_model.encode({"text": "what", "image": SQUARE})
    assert np.array_equal(first, small_model.encode({"image": SQUARE, "text": "what"}))
    parts = [{"type": "text", "text": "what"}, {"type": "image", "image": SQUARE}]
    assert np.array_equal(first, small_model.encode([{"role": "user", "content": parts}]))


# ------------------------------------------------------------------ again


def test_reloading_and_saving_again_changes_no_bit(directory: Path, tmp_path: Path):
    first = CAFe.from_pretrained(directory, device="cpu")
    first.save_pretrained(tmp_path / "second")
    second = CAFe.from_pretrained(tmp_path / "second", device="cpu")
    second.save_pretrained(tmp_path / "third")
    second.save_pretrained(tmp_path / "second")  # over itself
    third = CAFe.from_pretrained(str(tmp_path / "third"), device="cpu")
    for other in (second, third):
        assert np.array_equal(first.encode(INPUTS), other.encode(INPUTS))
        assert first.generate(MESSAGES, max_new_tokens=8) == other.generate(
            MESSAGES, max_new_tokens=8
        )
    for name in FILES:
        saved = [(tmp_path / copy / name).read_bytes() for copy in ("second", "third")]
        assert saved[0] == saved[1], name
    # The first one was written by a model that had never been a file.
    for name in FILES - {"config.json", "tokenizer_config.json"}:
        assert (directory / name).read_bytes() == (tmp_path / "third" / name).read_bytes(), name


def test_the_model_in_memory_is_the_model_on_disk(small_model: Any, small_dir: Path):
    loaded = CAFe.from_pretrained(small_dir, device="cpu")
    assert not loaded.training
    assert np.array_equal(small_model.encode(INPUTS), loaded.encode(INPUTS))
    assert small_model.generate(MESSAGES) == loaded.generate(MESSAGES)


def test_the_processor_is_left_as_it_was(small_model: Any, tmp_path: Path):
    before = small_model.processor.chat_template
    small_model.save_pretrained(tmp_path)
    assert small_model.processor.chat_template is before


def test_the_weights_take_the_type_that_is_asked_for(small_dir: Path):
    loaded = CAFe.from_pretrained(small_dir, dtype=torch.bfloat16, device="cpu", attention="eager")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.encode("a red cat").dtype == np.float32
    assert loaded.model.config._attn_implementation == "eager"


def test_loading_and_saving_are_silent(
    small_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    from transformers.utils import logging

    assert logging.is_progress_bar_enabled()
    CAFe.from_pretrained(small_dir, device="cpu").save_pretrained(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled(), "other users of transformers keep theirs"


# ------------------------------------------------------------------ what cannot be loaded


PROJECTOR = "multi_modal_projector.linear_1.weight"


def spoil(name: str) -> Callable[[Path], None]:
    """The ways in which a checkpoint directory goes wrong."""

    def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
        def apply(directory: Path) -> None:
            tensors = load_file(directory / "model.safetensors")
            change(tensors)
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

        return apply

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[PROJECTOR]

    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        assert tensors[PROJECTOR].shape != (3, 3)
        tensors[PROJECTOR] = torch.zeros(3, 3)

    def pickled(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")

    def another_family(directory: Path) -> None:
        config = {"model_type": "bert", "architectures": ["BertModel"]}
        (directory / "config.json").write_text(json.dumps(config))

    def own_code(directory: Path) -> None:
        parts = ("AutoConfig", "AutoProcessor", "AutoModelForImageTextToText")
        content = json.loads((directory / "config.json").read_text()) | {"model_type": "own"}
        content["auto_map"] = dict.fromkeys(parts, "own.Own")
        (directory / "config.json").write_text(json.dumps(content))
        (directory / "own.py").write_text("raise SystemExit('this code ran')")

    def more_tokens(directory: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.add_tokens([f"<new {i}>" for i in range(1000)])
        tokenizer.save_pretrained(directory)

    def elsewhere(place: str) -> Callable[[Path], None]:
        def apply(directory: Path) -> None:
            names = load_file(directory / "model.safetensors")
            shutil.move(directory / "model.safetensors", directory.parent / "other.safetensors")
            (directory / "extra.safetensors").write_bytes(b"")
            index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
            index["weight_map"] |= {PROJECTOR: place.format(directory.parent)}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))

        return apply

    return {
        "weights above": elsewhere("../other.safetensors"),
        "weights anywhere": elsewhere("{}/other.safetensors"),
        "a torn index": lambda d: (d / "model.safetensors.index.json").write_text('{"metad'),
        "code of its own": own_code,
        "too many tokens": more_tokens,
        "weights not downloaded": lambda d: (d / "model.safetensors").write_text(LFS),
        "tokenizer not downloaded": lambda d: (d / "tokenizer.json").write_text(LFS),
        "no weights": lambda d: (d / "model.safetensors").unlink(),
        "pickled weights": pickled,
        "no config": lambda d: (d / "config.json").unlink(),
        "config is not JSON": lambda d: (d / "config.json").write_text("{"),
        "one tensor missing": weights(drop),
        "one tensor of another shape": weights(reshape),
        "truncated weights": lambda d: (d / "model.safetensors").write_bytes(b"12345678abc"),
        "no tokenizer": lambda d: [(d / f).unlink() for f in FILES if f.startswith("tokenizer")],
        "another family": another_family,
    }[name]


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("no weights", r"no \*\.safetensors weights in .*; save the model there again"),
        ("pickled weights", r"no \*\.safetensors weights .*they can run code"),
        ("no config", r"no config\.json in .*; give a checkpoint directory"),
        ("config is not JSON", r"cannot be loaded \(.*config\.json.* not a valid JSON"),
        ("one tensor missing", r"1 weights are missing and 0 .*projector\.linear_1\.weight"),
        ("one tensor of another shape", r"0 weights are missing and 1 .*projector\.linear_1"),
        ("weights not downloaded", r"/model\.safetensors: is a Git LFS pointer.*git lfs pull"),
        ("tokenizer not downloaded", r"/tokenizer\.json: is a Git LFS pointer.*git lfs pull"),
        ("too many tokens", r"tokenizer has [\d,]+ tokens and the model embeddings for \d+"),
        ("weights above", r"names weights elsewhere \('\.\./other\.safetensors'\); put them"),
        ("weights anywhere", r"index\.json names weights elsewhere \('/.*put them beside it"),
        ("a torn index", r"index\.json: cannot be read"),
        ("code of its own", r"needs Python code of its own .* runs no code"),
        ("truncated weights", r"cannot be loaded \(.+\)"),
        ("no tokenizer", r"cannot be loaded \(.+\)"),
    ],
)
def test_a_spoilt_directory_is_one_error_that_names_it(
    small_dir: Path,
    tmp_path: Path,
    way: str,
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    directory = tmp_path / "model"
    shutil.copytree(small_dir, directory)
    CAFe.from_pretrained(directory, device="cpu")  # as it is, it loads
    spoil(way)(directory)
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("a question on the terminal"))
    with pytest.raises(CheckpointError, match=rf"model '{directory}': .*{message}") as caught:
        CAFe.from_pretrained(directory, device="cpu")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_template_in_the_tokenizers_configuration_is_read(small_dir: Path, tmp_path: Path):
    directory, again = tmp_path / "model", tmp_path / "again"
    shutil.copytree(small_dir, directory)
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").unlink()
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    content = json.dumps(settings | {"chat_template": template})
    (directory / "tokenizer_config.json").write_text(content)
    before = CAFe.from_pretrained(small_dir, device="cpu")
    model = CAFe.from_pretrained(directory, device="cpu")
    assert model.embedding_contract() == before.embedding_contract()
    model.save_pretrained(again)
    assert (again / "chat_template.jinja").read_text() == template
    assert CAFe.from_pretrained(again, device="cpu").embedding_contract() == (
        before.embedding_contract()
    )


def test_another_family_is_refused_before_its_weights_are_read(small_dir: Path, tmp_path: Path):
    directory = tmp_path / "model"
    shutil.copytree(small_dir, directory)
    spoil("another family")(directory)
    (directory / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(FamilyError, match="'bert': cafe has no facts"):
        CAFe.from_pretrained(directory)


@pytest.mark.parametrize(
    "name",
    ["no-such-model", "./nowhere", "/no/such/dir", "a/b/c", "~/nowhere", "owner/", "x y/z"],
)
def test_a_name_that_is_neither_directory_nor_hub_id_is_not_asked_of_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(CheckpointError, match=r"no such directory; give one, or a hub id"):
        CAFe.from_pretrained(name)


def test_a_file_is_not_a_checkpoint(small_dir: Path):
    with pytest.raises(CheckpointError, match="no such directory"):
        CAFe.from_pretrained(small_dir / "config.json")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_id_without_a_network_fails_after_one_try(
    monkeypatch: pytest.MonkeyPatch, offline: bool
):
    import huggingface_hub

    calls = []
    real = huggingface_hub.snapshot_download

    def once(*args: Any, **kwargs: Any) -> str:
        calls.append(args)
        # Port 9 of this machine refuses connections: what a missing network looks like.
        return real(*args, **kwargs, endpoint=None if offline else "http://127.0.0.1:9")

    if not offline:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", once)
    with pytest.raises(CheckpointError, match=r"model 'no-one/nothing': neither .* nor found") as e:
        CAFe.from_pretrained("no-one/nothing")
    assert "\n" not in str(e.value)
    assert len(calls) == 1
