"""Adapters: exact gradients, small exact checkpoints, files that load whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cafe.errors import CheckpointError, RecipeError
from cafe.model.checkpoint.adapter import adapter_of, merge_into_base
from cafe.model.checkpoint.directory import weights_dtype
from cafe.model.last_layer import prepare
from cafe.model.rerank import trained_temperature
from cafe.model.vlm import CAFe
from cafe.recipes import Objective, Tuning
from cafe.release.verify import probe_inputs
from cafe.training.checkpoints import complete
from cafe.training.contrastive import ContrastiveLoss
from cafe.training.optim import build_optimizer, parts_of
from cafe.training.run import train
from cafe.training.tuning import adapt, cast_frozen_linears_to_bf16, load_model
from helpers.builders import NAMES, build
from helpers.models import build_small_model, in_float64
from helpers.runs import Killed, die_after, equal, make_world, recipe, without_times
from helpers.twin import gradients, make_examples, run_step, three_passes, worst_difference

pytestmark = pytest.mark.slow  # every test trains

JOINT = Objective(contrastive_weight=0.7, language_weight=1.3)
LORA = Tuning(kind="lora", rank=4, alpha=8)
DORA = Tuning(kind="dora", rank=4, alpha=8, parts=["vision", "language"])
BESIDE = Tuning(kind="lora", rank=4, alpha=8, full_parts=["projector"])
ADAPTER = ("tuning.kind=lora", "tuning.rank=4", "tuning.alpha=8")


def adapted(tuning: Tuning, **sizes: Any) -> CAFe:
    """A random model with a random adapter; a fresh one would change nothing."""
    model = build_small_model(**sizes)
    adapt(model, tuning, "tiny")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            elif "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return model.eval()


def learning(model: CAFe) -> list[str]:
    return [name for name, p in model.model.named_parameters() if p.requires_grad]


# ---------------------------------------------------------------------- what is adapted


def test_only_linear_layers_of_the_named_parts_are_adapted() -> None:
    """SigLIP and Qwen2 share the names q_proj, k_proj, v_proj: names alone would hit both."""
    model = adapted(LORA)
    names = learning(model)
    assert names
    assert all(n.startswith("model.language_model.layers.") and ".lora_" in n for n in names)
    assert len(names) == 2 * 7 * 2  # A and B of seven layers in each of two blocks
    both = learning(adapted(DORA))
    assert {n.split(".")[1] for n in both} == {"vision_tower", "language_model"}
    assert any("magnitude" in n for n in both)


def test_targets_choose_among_the_layers_of_a_part() -> None:
    names = learning(adapted(Tuning(kind="lora", targets=["q_proj", "mlp.up_proj"])))
    assert {n.partition(".lora_")[0].rpartition("layers.")[2] for n in names} == {
        f"{i}.{layer}" for i in (0, 1) for layer in ("self_attn.q_proj", "mlp.up_proj")
    }


def test_a_full_part_learns_its_modules_and_no_bare_parameter() -> None:
    """A bare parameter has no place in peft's format, so other tools would load without it."""
    names = learning(adapted(BESIDE))
    projector = [n for n in names if n.startswith("model.multi_modal_projector.")]
    assert len(projector) == 4
    assert "model.image_newline" not in names
    assert all(n in projector or ".lora_" in n for n in names)


def test_learning_rates_per_part_reach_the_adapter() -> None:
    from cafe.recipes import Optimizer

    model = adapted(Tuning(kind="lora", parts=["vision", "language"], full_parts=["projector"]))
    settings = Optimizer(
        learning_rate=1e-3, vision_learning_rate=1e-5, projector_learning_rate=1e-4
    )
    groups = build_optimizer(parts_of(model), ContrastiveLoss(JOINT), settings, "cpu").param_groups
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {
        "vision": 1e-5,
        "projector": 1e-4,
        "projector, no decay": 1e-4,
        "language": 1e-3,
    }


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        (
            Tuning(kind="lora", targets=["query"]),
            r"tuning\.targets is \['query'\], but language has no such layer; it has down_proj, ",
        ),
        (
            Tuning(kind="lora", parts=["projector"], targets=["q_proj"]),
            "but projector has no such layer; it has linear_1, linear_2",
        ),
        (
            Tuning(kind="lora", targets=["q_proj", "v_porj"]),
            r"names 'v_porj', but no layer of language has this name; .*adapted are q_proj",
        ),
        (
            Tuning(kind="lora", parts=["vision", "language"], targets=["q_proj", "query"]),
            "names 'query', but no layer of vision and language has this name",
        ),
        (
            Tuning(kind="lora", targets=["q_proj", "lm_head"]),
            "names 'lm_head', but the language head and the token embedding are never adapted",
        ),
        (
            Tuning(kind="lora", targets=["language_model.embed_tokens", "q_proj"]),
            r"names 'language_model\.embed_tokens', but the language head and the token embedding",
        ),
    ],
)
def test_a_target_that_is_no_layer_is_named_with_those_that_are(
    tuning: Tuning, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        adapt(build_small_model(), tuning, "tiny")


def test_a_target_need_not_be_in_every_part() -> None:
    tuning = Tuning(kind="lora", parts=["vision", "language"], targets=["q_proj", "up_proj"])
    assert any(".up_proj." in name for name in learning(adapted(tuning)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tuning.rank=4"], "tuning: kind is full, so there is no adapter that takes rank"),
        (
            [*ADAPTER, "tuning.parts=[projector]", "tuning.full_parts=[projector]"],
            "tuning: projector is in parts and in full_parts",
        ),
        ([*ADAPTER, "optimizer.freeze=[language]"], "language is in optimizer.freeze and in tun"),
    ],
)
def test_contradictions_are_errors(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, tmp_path / "out", *overrides)


def test_qlora_without_bitsandbytes_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cafe.training.tuning.find_spec", lambda _: None)
    world = make_world(tmp_path)
    with pytest.raises(RecipeError, match=r"qlora, which needs bitsandbytes.*pip install bitsand"):
        train(recipe(world, tmp_path / "out", "tuning.kind=qlora"))


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
def test_qlora_trains_resumes_and_leaves_an_adapter_of_the_whole_base(tmp_path: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    world = make_world(tmp_path)
    settings = ("tuning.kind=qlora", *ADAPTER[1:], "tuning.full_parts=[projector]")
    core = load_model(recipe(world, tmp_path / "none", *settings), torch.device("cpu"))
    small = {name for name, module in core.model.named_modules() if type(module) is Linear4bit}
    assert len(small) == 2 * 7  # seven layers in each of two blocks, and nothing else
    assert all(".language_model." in name and name.endswith(".base_layer") for name in small)

    whole = train(recipe(world, tmp_path / "whole", *settings))
    losses = [record.loss for record in whole.records]
    assert min(losses[-2:]) < losses[0]
    with pytest.raises(Killed):
        train(recipe(world, tmp_path / "out", *settings), on_step=die_after(5))
    resumed = train(recipe(world, tmp_path / "out", *settings), resume=True)
    a, b = (load_file(r.model_dir / "adapter_model.safetensors") for r in (whole, resumed))
    assert equal(a, b)

    inputs = probe_inputs()
    base, tuned = (CAFe.from_pretrained(d) for d in (world / "model", whole.model_dir))
    assert np.abs(tuned.encode(inputs) - base.encode(inputs)).max() > 1e-3


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("tuning", [LORA, DORA, BESIDE], ids=["lora", "dora", "full part"])
@pytest.mark.parametrize("chunk", [None, 2], ids=["direct", "cached"])
def test_an_adapters_gradients_are_those_of_three_passes(tuning: Tuning, chunk: int | None) -> None:
    model = in_float64(adapted(tuning))
    examples = make_examples(6)
    three_passes(model, examples, JOINT)
    expected = gradients(model)
    run_step(model, examples, JOINT, chunk)
    assert worst_difference(gradients(model), expected) < 1e-9
    moved = {n for n, gradient in expected.items() if gradient.abs().max() > 1e-8}
    learned = {f"model.{n}" for n in learning(model)}
    assert moved <= learned
    assert len(moved) > 0.9 * len(learned), "most gradients are zero: nothing was compared"


def test_adapter_dropout_falls_alike_in_both_passes() -> None:
    """With one chunk nothing is computed twice; the same draws must give the same gradients."""
    tuning = Tuning(kind="lora", rank=4, dropout=0.3)
    model = in_float64(adapted(tuning)).train()
    examples = make_examples(4)
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        run_step(model, examples, JOINT, 2)
        found.append(gradients(model))
    assert worst_difference(found[1], found[0]) == 0
    assert worst_difference(found[2], found[0]) > 1e-3, "dropout changed nothing"


def test_halved_frozen_layers_change_no_bit_under_autocast() -> None:
    examples = make_examples(4)

    def step(model: CAFe) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            run_step(model, examples, JOINT)
        return {n: g for n, g in gradients(model).items() if ".lora_" in n}

    whole, halved = adapted(LORA), adapted(LORA)
    cast_frozen_linears_to_bf16(halved)
    layer = halved.model.get_submodule("model.language_model.layers.0.mlp.up_proj")
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert layer.lora_A.default.weight.dtype == torch.float32
    assert halved.lm_head.weight.dtype == torch.float32
    assert equal(step(whole), step(halved))


# ---------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "model"
    build_small_model().save_pretrained(directory)
    return directory


def saved(tuning: Tuning, base: Path, directory: Path) -> CAFe:
    """A random adapter beside the saved base, and its files in `directory`."""
    model = adapted(tuning)
    if tuning.full_parts:
        with torch.no_grad():
            model.model.model.multi_modal_projector.linear_1.weight.mul_(1.5)
    adapter_of(model.model).base_model_name_or_path = str(base)  # type: ignore[union-attr]
    model.save_pretrained(directory)
    return model


PROBES = probe_inputs()


@pytest.mark.parametrize("tuning", [LORA, DORA, BESIDE], ids=["lora", "dora", "full part"])
def test_a_saved_adapter_loads_alone_and_on_a_given_base(
    tuning: Tuning, base: Path, tmp_path: Path
) -> None:
    expected = saved(tuning, base, tmp_path / "a").encode(PROBES)
    plain = CAFe.from_pretrained(base).encode(PROBES)
    assert np.abs(plain - expected).max() > 1e-2, "the adapter changes nothing"
    alone = CAFe.from_pretrained(tmp_path / "a")
    assert np.array_equal(alone.encode(PROBES), expected)
    given = CAFe.from_pretrained(base, adapter=tmp_path / "a")
    assert np.array_equal(given.encode(PROBES), expected)
    given.save_pretrained(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert not (tmp_path / "a" / "modules.json").exists()  # sentence-transformers cannot load it
    assert (tmp_path / "a" / "embedding_template.jinja").is_file()


@pytest.mark.parametrize("tuning", [LORA, DORA, BESIDE], ids=["lora", "dora", "full part"])
def test_plain_peft_reads_our_directory(tuning: Tuning, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    expected = saved(tuning, base, tmp_path / "a").encode(PROBES)
    model = CAFe.from_pretrained(base)
    PeftModel.from_pretrained(model.model, str(tmp_path / "a"))  # changes it in place
    assert np.array_equal(model.eval().encode(PROBES), expected)


def test_an_adapter_that_peft_made_loads(base: Path, tmp_path: Path) -> None:
    """Written by another tool: layers named by their ends, another module kept whole."""
    from peft import LoraConfig, get_peft_model

    model = CAFe.from_pretrained(base)
    config = LoraConfig(
        r=2, target_modules=["o_proj", "out_proj"], modules_to_save=["linear_2"], use_rslora=True
    )
    wrapped = get_peft_model(model.model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    expected = model.eval().encode(PROBES)
    loaded = CAFe.from_pretrained(base, adapter=tmp_path / "peft")
    assert np.abs(loaded.encode(PROBES) - expected).max() < 1e-6
    assert np.abs(CAFe.from_pretrained(base).encode(PROBES) - expected).max() > 1e-3


KEY = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.weight"


def change(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = directory / "adapter_model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return apply


def rename(old: str, new: str) -> Callable[[Path], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change(edit)


def settings(**values: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            change(lambda t: t.pop(KEY)),
            rf"1 of its weights are missing and 0 have no place .*\(first: {KEY}\); load it on the "
            r"model that it was trained on, '.*base.*/model', or copy its two files again",
        ),
        (
            change(lambda t: t.update({KEY.replace("layers.1", "layers.7"): torch.ones(4, 64)})),
            r"0 of its weights are missing and 1 have no place .*layers\.7\.mlp\.up_proj\.lora_A",
        ),
        (
            change(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)})),
            r"1 have no place in the model \(first: base_model\.model\.lm_head\.weight\)",
        ),
        (
            change(lambda t: t.pop("base_model.model.model.multi_modal_projector.linear_2.bias")),
            r"1 of its weights are missing .*multi_modal_projector\.linear_2\.bias",
        ),
        (change(lambda t: t.update({KEY: torch.ones(3, 64)})), r"does not fit .*(size|shape)"),
        (
            rename("model.model.language_model.layers", "model.model.layers"),
            r"28 of its weights are missing and 28 have no place .*its keys begin with "
            r"base_model\.model\.model\.layers, as another version of transformers .*rename them "
            r"to base_model\.model\.model\.language_model\.layers",
        ),
        (settings(r=8), r"does not fit the model \(.*(size|shape)"),
        (settings(peft_type="IA3"), "an adapter of kind IA3; cafe reads LoRA and DoRA"),
        (settings(base_model_name_or_path=None), "names no base_model_name_or_path"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "adapter_config.json cannot be re"),
        (settings(target_modules=["nothing"]), r"does not fit the model \(Target modules"),
    ],
    ids=[
        "missing", "unexpected", "unexpected whole", "missing whole", "shape", "v4 keys", "rank",
        "other kind", "no base", "no weights", "broken config", "no target",
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_match_is_one_error_naming_directory_key_and_fix(
    base: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    saved(BESIDE, base, tmp_path / "a")
    CAFe.from_pretrained(tmp_path / "a")  # as it is, it loads
    spoil(tmp_path / "a")
    with pytest.raises(CheckpointError, match=message) as caught:
        CAFe.from_pretrained(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_older_keys_that_transformers_itself_renames_load(base: Path, tmp_path: Path) -> None:
    """LLaVA-OneVision's own v4 prefix; peft converts it, and every key is then accounted for."""
    expected = saved(LORA, base, tmp_path / "a").encode(PROBES)
    rename("model.model.language_model.layers", "model.language_model.model.layers")(tmp_path / "a")
    assert np.array_equal(CAFe.from_pretrained(tmp_path / "a").encode(PROBES), expected)


def test_a_base_that_is_gone_is_named(base: Path, tmp_path: Path) -> None:
    saved(LORA, base, tmp_path / "a")
    settings(base_model_name_or_path="/no/such/base")(tmp_path / "a")
    message = (
        rf"adapter '{tmp_path / 'a'}': adapter_config.json says .* '/no/such/base' "
        r"\(base_model_name_or_path\), .* no such directory.*; write there .*adapter=directory"
    )
    with pytest.raises(CheckpointError, match=message):
        CAFe.from_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=message):
        weights_dtype(tmp_path / "a")
    CAFe.from_pretrained(base, adapter=tmp_path / "a")


@pytest.mark.parametrize("tuning", [LORA, DORA, BESIDE], ids=["lora", "dora", "full part"])
def test_merged_is_unmerged(tuning: Tuning) -> None:
    model = adapted(tuning)
    names = set(build_small_model().state_dict())
    before = model.encode(PROBES)
    merge_into_base(model.model)
    assert adapter_of(model.model) is None
    assert set(model.state_dict()) == names
    assert np.abs(model.encode(PROBES) - before).max() < 1e-5


@pytest.mark.parametrize("family", NAMES)
def test_every_family_takes_an_adapter_that_loads_in_peft_too_and_merges(
    family: str, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers.modeling_layers import GradientCheckpointingLayer

    base = build(family, tmp_path / "base")
    model = CAFe.from_pretrained(base)
    assert any(isinstance(m, GradientCheckpointingLayer) for m in model.modules())  # FSDP's units
    tuning = Tuning(kind="lora", rank=2, parts=["vision", "language"], full_parts=["projector"])
    adapt(model, tuning, str(base))
    names = learning(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            elif name in names and "lora" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    for part, prefixes in model.family.parts.items():
        learned = [n for n in names if n.startswith(prefixes)]
        assert learned, part
        assert all((".lora_" in n) == (part != "projector") for n in learned)
    inputs = ["a red cat", PROBES[3]]
    expected = model.encode(inputs)
    model.save_pretrained(tmp_path / "a")
    assert np.abs(CAFe.from_pretrained(base).encode(inputs) - expected).max() > 1e-3
    loaded = CAFe.from_pretrained(tmp_path / "a")
    assert np.array_equal(loaded.encode(inputs), expected)
    plain = CAFe.from_pretrained(base)
    PeftModel.from_pretrained(plain.model, str(tmp_path / "a"))
    prepare(plain.model.get_decoder())  # for peft has put something around its parts
    assert np.array_equal(plain.eval().encode(inputs), expected)
    merge_into_base(loaded.model)
    assert np.abs(loaded.encode(inputs) - expected).max() < 1e-5


# ---------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), dropout=0.2)


RUN = (
    *ADAPTER,
    *("tuning.dropout=0.1", "tuning.full_parts=[projector]", "schedule.steps=6"),
    "objective.temperature=0.07",
)


def files(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "adapter_model.safetensors")


def test_a_resumed_adapter_run_is_bit_for_bit_as_one_never_stopped_and_small(
    world: Path, tmp_path: Path
) -> None:
    train(recipe(world, tmp_path / "never", *RUN))
    out = tmp_path / "killed"
    with pytest.raises(Killed):
        train(recipe(world, out, *RUN), on_step=die_after(5))
    (_, newest) = complete(out / "checkpoints")[-1]
    held = load_file(newest / "weights.safetensors")
    assert all(".lora_" in name or "multi_modal_projector" in name for name in held)
    train(recipe(world, out, *RUN), resume=True)
    assert without_times(out) == without_times(tmp_path / "never")
    assert equal(files(out), files(tmp_path / "never"))

    # What the run leaves is an adapter of the run's base, and it embeds as another than the base.
    loaded, plain = CAFe.from_pretrained(out / "model"), CAFe.from_pretrained(world / "model")
    assert np.abs(loaded.encode(PROBES) - plain.encode(PROBES)).max() > 1e-4
    assert json.loads((out / "model" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(world / "model")
    assert trained_temperature(loaded.model.config) == 0.07
    sizes = [f.stat().st_size for f in (world / "model").rglob("*.safetensors")]
    assert (newest / "weights.safetensors").stat().st_size < sum(sizes) / 4


def test_a_checkpoint_of_another_base_or_another_adapter_is_refused(
    world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        train(recipe(world, out, *RUN), on_step=die_after(3))
    other = make_world(tmp_path / "other", vision_layers=2)
    shutil.copytree(world / "model", tmp_path / "touched")
    change_base(tmp_path / "touched")
    for override, message in [
        (f"model={other}/model", "does not fit this recipe"),
        (f"model={tmp_path / 'touched'}", "the model under the adapter is a different one"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            train(recipe(world, out, *RUN, override), resume=True)
    for override, was_and_is in [
        ("tuning.kind=dora", "lora and is now dora"),
        ("tuning.rank=8", "4 and is now 8"),
        ("tuning.alpha=16", "8 and is now 16"),
        ("tuning.parts=[language,vision]", "[language] and is now [language, vision]"),
        ("tuning.targets=[q_proj]", "null and is now [q_proj]"),
        ("tuning.full_parts=[]", "[projector] and is now []"),
    ]:
        with pytest.raises(CheckpointError) as caught:
            train(recipe(world, out, *RUN, override), resume=True)
        key = override.partition("=")[0]
        assert str(caught.value).partition("step-000002: ")[2] == (
            f"{key} was {was_and_is}, which changes what is trained; set it back, or start a new "
            "run in another output_dir"
        )
    with pytest.raises(CheckpointError, match=r"tuning\.kind was lora and is now full, which"):
        train(recipe(world, out), resume=True)


def change_base(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_training_starts_from_whole_weights_only(base: Path, tmp_path: Path) -> None:
    saved(LORA, base, tmp_path / "a")
    with pytest.raises(RecipeError, match=r"is an adapter.*cafe export .*/a --to DIR --merge"):
        train(recipe(make_world(tmp_path), tmp_path / "out", f"model={tmp_path / 'a'}"))
