"""`cafe export` writes what embeds as its source does, or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import cafe.release.verify as verify_module
from cafe.errors import CheckpointError
from cafe.model.checkpoint.adapter import merge_into_base
from cafe.model.vlm import CAFe
from cafe.recipes import Tuning
from cafe.release.release import export
from cafe.release.verify import probe_inputs, verify
from cafe.training.tuning import adapt
from helpers.models import build_small_model

PROBES = probe_inputs()


@pytest.fixture
def run(command_line: Any) -> Any:
    return command_line


def make_adapter(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random DoRA of every part beside a saved base."""
    core = build_small_model()
    core.model.to(dtype)
    core.save_pretrained(folder / "base")
    core = CAFe.from_pretrained(folder / "base", dtype=torch.float32)
    adapt(core, Tuning(kind="dora", rank=4, parts=["vision", "language"]), str(folder / "base"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    core.save_pretrained(folder / "adapter")
    return folder / "adapter"


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b, axis=1).max())


def files(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*.*")}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_adapter_is_a_whole_model_that_every_tool_reads(
    run: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    adapter = make_adapter(tmp_path, dtype)
    code, out, err = run("export", adapter, "--to", tmp_path / "whole", "--merge")
    assert (code, err) == (0, "")
    assert "merged" in out
    assert "embeddings of 7 probes are at most" in out
    assert "(tolerance " in out
    assert files(tmp_path / "whole") == files(tmp_path / "base") | {"README.md"}
    expected = CAFe.from_pretrained(adapter).encode(PROBES)
    bound = 1e-4 if dtype == torch.float32 else 5e-2
    plain = CAFe.from_pretrained(tmp_path / "base").encode(PROBES)
    assert apart(plain, expected) > 2 * bound, "the adapter changes nothing"
    assert apart(CAFe.from_pretrained(tmp_path / "whole").encode(PROBES), expected) <= bound

    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(tmp_path / "whole"), device="cpu").float()
    assert apart(theirs.encode(PROBES), expected) <= bound + 1e-4


def test_a_merge_that_changes_embeddings_fails_and_leaves_nothing(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path)

    def forgetful(model: Any) -> None:
        merge_into_base(model)
        with torch.no_grad():
            model.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.1)

    monkeypatch.setattr("cafe.release.release.merge_into_base", forgetful)
    code, out, err = run("export", adapter, "--to", tmp_path / "whole", "--merge")
    assert (code, out) == (2, "")
    assert "after merging it, embeddings of 7 probes are up to" in err
    assert "apart, more than 1e-04" in err
    assert not (tmp_path / "whole").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_whole_model_and_an_adapter_are_exported_as_they_are(run: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path)
    assert run("export", adapter, "--to", tmp_path / "copy")[0] == 0
    assert files(tmp_path / "copy") == files(adapter), "peft's own card stays"
    code, out, _ = run("export", tmp_path / "base", "--to", tmp_path / "model")
    assert code == 0
    assert "float32; embeddings of 7 probes are at most 0.0e+00 apart" in out
    name = "model.safetensors"
    assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_what_cannot_be_exported_is_one_line(run: Any, small_dir: Path, tmp_path: Path) -> None:
    code, _, err = run("export", small_dir, "--to", tmp_path / "new", "--merge")
    assert code == 2
    assert "has no adapter to merge" in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    code, _, err = run("export", small_dir, "--to", tmp_path / "full")
    assert code == 2
    assert "already exists; name a new directory" in err
    assert (tmp_path / "full" / "file").read_text() == "kept"


# ---------------------------------------------------------------------- --verify and the card


def result_of(model: Path, folder: Path) -> Path:
    """A result file as `cafe evaluate --json` leaves it."""
    record = {
        "task": "retrieval",
        "model": str(model),
        "count": 1234,
        "samples": "0123",
        "scores": {"R@1": 0.5, "loss": 0.25},
        "intervals": {"R@1": [0.4, 0.6]},
        "items": {},
        "ratios": {},
        "means": {},
        "derived": None,
        "format": 1,
    }
    folder.mkdir()
    (folder / "retrieval.json").write_text(json.dumps(record))
    return folder


def test_every_tool_agrees_and_the_card_says_what_was_measured(
    run: Any, small_dir: Path, tmp_path: Path
) -> None:
    results = result_of(small_dir, tmp_path / "results")
    code, out, err = run(
        "export", small_dir, "--to", tmp_path / "out", "--verify", "--results", results
    )
    assert (code, err) == (0, "")
    tools = ["transformers", "sentence-transformers", "cafe serve"]
    lines = out.splitlines()
    assert [line.split(" ")[0] for line in lines[:3]] == ["transformers", *tools[1:2], "cafe"]
    assert all(float(line.split("cosine ")[1][:9]) > 0.999999 for line in lines[:3])
    card = (tmp_path / "out" / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(head)["library_name"] == "transformers"
    for told in (
        *(f"| {tool}" for tool in tools),
        "| R@1 | 0.5000 | 0.4000 to 0.6000 |",
        "| loss | 0.2500 |  |",
        "### retrieval (1,234 samples)",
        "| family | llava_onevision |",
        "vllm serve out --runner generate",
        "vllm serve out --runner pooling",
        "out/embedding_template.jinja",
    ):
        assert told in body, told
    template = tmp_path / "out" / "embedding_template.jinja"
    assert template.is_file(), "the card sends vLLM there"
    assert "No results were provided" not in body


def test_a_card_without_results_says_how_to_get_them(
    run: Any, small_dir: Path, tmp_path: Path
) -> None:
    assert run("export", small_dir, "--to", tmp_path / "out")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No results were provided. To add them, run `cafe evaluate out --json results`" in card
    assert "smallest cosine" not in card


def test_a_tool_that_reads_no_thought_is_named(small_dir: Path, tmp_path: Path) -> None:
    """A template that drops past answers embeds all but images with thoughts alike."""
    directory = tmp_path / "deaf"
    shutil.copytree(small_dir, directory)
    template = directory / "embedding_template.jinja"
    loop = "{%- for message in messages -%}{{- "
    deaf = "{%- for message in messages if message['role'] != 'assistant' -%}{{- "
    assert template.read_text().count(loop) == 1
    template.write_text(template.read_text().replace(loop, deaf))
    with pytest.raises(CheckpointError, match=r"transformers .* embeds 9 probes with a cosine of"):
        verify(directory)


def test_the_card_says_how_embeddings_are_to_be_read(small_dir: Path, tmp_path: Path) -> None:
    model = CAFe.from_pretrained(small_dir)
    model.model.config.trained_thought_tokens = 23
    model.save_pretrained(tmp_path / "thinks")
    assert export(tmp_path / "thinks", tmp_path / "out").thoughts == 23
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`encode(images, think=23)`" in card
    export(small_dir, tmp_path / "plain")
    assert "think" not in (tmp_path / "plain" / "README.md").read_text()
    small = CAFe.from_pretrained(small_dir)
    small.model.to(torch.bfloat16)
    small.save_pretrained(tmp_path / "half")
    export(tmp_path / "half", tmp_path / "of_half")
    told = (
        'in the type of the weights, bfloat16,\nunless they are told: `model_kwargs={"dtype": "flo'
    )
    assert told in (tmp_path / "of_half" / "README.md").read_text()
    assert "unless they are told" not in card


def test_a_tool_that_disagrees_is_named_and_nothing_is_left(
    run: Any, small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verify_module._transformers

    def other(directory: Path, probes: Any) -> np.ndarray:
        return np.roll(real(directory, probes), 1, axis=0)

    monkeypatch.setattr(verify_module, "_transformers", other)
    code, out, err = run("export", small_dir, "--to", tmp_path / "out", "--verify")
    assert (code, out) == (2, "")
    assert "transformers 5." in err
    assert "embeds 9 probes with a cosine of" in err
    assert not (tmp_path / "out").exists()


def test_a_model_is_verified_where_it_is(run: Any, small_dir: Path) -> None:
    before = files(small_dir)
    code, out, _ = run("export", small_dir, "--verify")
    assert code == 0
    assert len(out.splitlines()) == 3
    assert files(small_dir) == before


def test_what_cannot_be_verified_is_told(run: Any, small_dir: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path)
    code, _, err = run("export", adapter, "--to", tmp_path / "out", "--verify")
    assert (code, "merge it (--merge)" in err) == (2, True)
    assert not (tmp_path / "out").exists()
    results = result_of(tmp_path / "base", tmp_path / "results")
    code, _, err = run("export", small_dir, "--to", tmp_path / "out", "--results", results)
    assert (code, "was measured on" in err) == (2, True)
    for arguments in ((), ("--verify", "--merge")):
        code, _, err = run("export", small_dir, *arguments)
        assert (code, "--to DIR" in err) == (2, True)


# ---------------------------------------------------------------------- from Python


def test_export_and_verify_report_and_print_nothing(
    small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def embed(directory: Path, probes: Any) -> np.ndarray:
        return CAFe.from_pretrained(directory, dtype=torch.float32).encode(probes)

    for tool in ("_transformers", "_sentence_transformers", "_server"):
        monkeypatch.setattr(verify_module, tool, embed)
    seen: list[Any] = []
    report = export(small_dir, tmp_path / "out", verify=True, on_agreement=seen.append)
    assert (report.directory, report.merged, report.dtype) == (
        tmp_path / "out",
        False,
        torch.float32,
    )
    assert (report.distance, report.probes, report.family) == (0.0, 7, "llava_onevision")
    assert len(seen) == 3
    assert report.agreements == tuple(seen)
    verified = verify_module.verify(tmp_path / "out")
    assert [a.tool for a in verified.agreements] == [a.tool for a in seen]
    assert (verified.probes, verified.tolerance) == (9, report.tolerance)
    assert all(a.distance == 0 for a in verified.agreements)
    assert capsys.readouterr().out == ""


def test_an_adapter_is_not_verified_and_no_model_is_loaded_to_find_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path)
    monkeypatch.setattr(CAFe, "from_pretrained", None)
    with pytest.raises(CheckpointError, match=r"merge it \(--merge\)"):
        export(adapter, tmp_path / "out", verify=True)
    with pytest.raises(CheckpointError, match="only peft and cafe load"):
        verify_module.verify(adapter)
    assert not (tmp_path / "out").exists()
