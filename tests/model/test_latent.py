"""Latent thoughts: learned tokens before the pooled one, saved so that every tool reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from torch.nn import functional

from cafe.data.scenes import write_scenes
from cafe.errors import CheckpointError, DataError, RecipeError
from cafe.model.latent import (
    LATENT_KEY,
    add_latent_tokens,
    averaged_tokens,
    latent_count,
    latent_names,
    latent_text,
)
from cafe.model.vlm import CAFe
from cafe.recipes import Objective, load_recipe
from cafe.release.release import export
from cafe.release.verify import verify
from cafe.training.run import train
from cafe.training.tuning import load_model
from cafe.types import Image, user
from helpers.models import build_small_model, in_float64
from helpers.twin import _inputs, gradients, make_examples, run_step, three_passes, worst_difference

COUNT = 3
JOINT = Objective(contrastive_weight=0.7, language_weight=1.3)


def with_latent(model: CAFe, count: int = COUNT, pooling: str = "last") -> CAFe:
    """The same model after `add_latent_tokens`, as a recipe's `load_model` makes it."""
    add_latent_tokens(model.model, model.processor, count, pooling)
    return CAFe(model.model, model.processor)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return in_float64(with_latent(build_small_model()))


def test_they_stand_before_the_pooled_token_of_every_embedding(model: CAFe) -> None:
    ids = model.processor.tokenizer.convert_tokens_to_ids(list(latent_names(COUNT)))
    end = model.processor.tokenizer.convert_tokens_to_ids(model.collator.pooled_token)
    image = Image(PIL.Image.new("RGB", (96, 96), "red"))
    for prompt in ("compress", "none"):
        rows, _ = model.collator.embedding_rows([user("a cat"), user(image)], prompt)
        for row, pooled in enumerate(rows.pooled.tolist()):
            last = pooled % rows.input_ids.shape[1]
            assert rows.input_ids[row, last - COUNT : last + 1].tolist() == [*ids, end]
    question, _ = model.collator.prompt_rows([user(image, "Is it red?")])
    assert not torch.isin(question.input_ids, torch.tensor(ids)).any()


def test_nobody_can_write_them(model: CAFe) -> None:
    ids = model.processor.tokenizer.convert_tokens_to_ids(list(latent_names(COUNT)))
    rows, _ = model.collator.embedding_rows([user("a <|latent_0|> cat")], "compress")
    assert int((rows.input_ids == ids[0]).sum()) == 1


def test_gradients_are_those_of_three_passes_and_reach_the_tokens(model: CAFe) -> None:
    examples = make_examples(4)
    three_passes(model, examples, JOINT)
    expected = gradients(model)
    run_step(model, examples, JOINT, 2)
    found = gradients(model)
    assert worst_difference(found, expected) < 1e-9
    ids = model.processor.tokenizer.convert_tokens_to_ids(list(latent_names(COUNT)))
    embedding = next(name for name in found if name.endswith("embed_tokens.weight"))
    assert found[embedding][ids].abs().amax(dim=1).min() > 1e-8


def test_new_rows_lie_near_the_mean_and_the_others_stay() -> None:
    model = build_small_model()
    before = model.model.get_input_embeddings().weight.detach().clone()
    torch.manual_seed(0)
    add_latent_tokens(model.model, model.processor, COUNT)
    after = model.model.get_input_embeddings().weight.detach()
    ids = model.processor.tokenizer.convert_tokens_to_ids(list(latent_names(COUNT)))
    kept = [i for i in range(len(before)) if i not in ids]
    assert torch.equal(after[kept], before[kept])
    assert (after[ids] - before[kept].mean(0)).norm(dim=1).max() < 0.5 * before[kept].std(0).norm()
    assert after[ids[0]].ne(after[ids[1]]).any()
    assert model.lm_head.weight.shape == after.shape


def test_a_model_keeps_its_own_and_refuses_another_number(model: CAFe) -> None:
    before = model.model.get_input_embeddings().weight.detach().clone()
    add_latent_tokens(model.model, model.processor, COUNT)
    assert torch.equal(model.model.get_input_embeddings().weight, before)
    with pytest.raises(CheckpointError, match="trained with 3 latent tokens"):
        add_latent_tokens(model.model, model.processor, 5)


@pytest.mark.parametrize("value", [-1, 65, "3", True, 1.5])
def test_a_configuration_that_names_no_number(value: Any, small_model: CAFe, model: CAFe) -> None:
    class Config:
        latent_tokens = value

    assert LATENT_KEY == "latent_tokens"
    with pytest.raises(CheckpointError, match=r"config\.json: latent_tokens is"):
        latent_count(Config)
    Config.latent_tokens = COUNT - 1
    with pytest.raises(CheckpointError, match=r"tokenizer has more of these"):
        latent_text(Config, model.processor.tokenizer)
    Config.latent_tokens = 2
    with pytest.raises(CheckpointError, match=r"tokenizer has no <\|latent_0\|>"):
        latent_text(Config, small_model.processor.tokenizer)


@pytest.mark.slow
def test_trained_saved_and_read_by_sentence_transformers(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    write_scenes(tmp_path / "scenes", 6, 0)
    recipe = {
        "model": "tiny",
        "output_dir": str(tmp_path / "run"),
        "data": [{"path": str(tmp_path / "scenes" / "captions.json")}],
        "objective": {"latent_tokens": COUNT},
        "batch": {"examples": 4, "chunk": 2, "workers": 0},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"steps": 2},
        "precision": "fp32",
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    start = load_model(load_recipe(tmp_path / "r.yaml"), torch.device("cpu"))
    assert start.collator.latent == "".join(latent_names(COUNT))
    result = train(str(tmp_path / "r.yaml"))
    model = CAFe.from_pretrained(result.model_dir, device="cpu")
    assert latent_count(model.model.config) == COUNT
    image = PIL.Image.open(tmp_path / "scenes" / "images" / "000000.png")
    found = model.encode([image, "a red cat"])
    kwargs = {"dtype": torch.float32}
    stock = SentenceTransformer(str(result.model_dir), device="cpu", model_kwargs=kwargs).encode(
        [image, "a red cat"], normalize_embeddings=True
    )
    np.testing.assert_allclose(found, stock, atol=1e-5)
    assert model.generate({"image": image, "text": "How many objects are there?"})
    # Trained on from there, with the recipe's number or without a word.
    again = load_recipe(tmp_path / "r.yaml", [f"model={result.model_dir}"])
    assert load_model(again, torch.device("cpu")).collator.latent == model.collator.latent


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tuning.kind=lora"], "set tuning.kind: full instead of lora"),
        (["optimizer.freeze=[language]"], "optimizer.freeze has language"),
        (["objective.compat=official"], "has no latent_tokens"),
        (["objective.latent_tokens=65"], "latent_tokens"),
        (["objective.contrastive_weight=0"], "latent_tokens is trained by a contrastive loss"),
    ],
)
def test_recipes_that_make_no_sense(overrides: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: tiny\noutput_dir: out\ndata: [{path: x.json}]\nobjective: {latent_tokens: 2}\n"
        "batch: {examples: 2}\noptimizer: {learning_rate: 1e-3}\nschedule: {steps: 1}\n"
    )
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.yaml", overrides)


def test_data_without_pairs_train_no_tokens(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", 4, 0)
    (tmp_path / "r.yaml").write_text(
        f"model: tiny\noutput_dir: {tmp_path / 'out'}\n"
        f"data: [{{path: {tmp_path / 'scenes' / 'captions.json'}, mode: chat}}]\n"
        "objective: {latent_tokens: 2}\nbatch: {examples: 2}\n"
        "optimizer: {learning_rate: 1e-3}\nschedule: {steps: 1}\n"
    )
    with pytest.raises(DataError, match="latent_tokens: none of the examples is a pair"):
        train(str(tmp_path / "r.yaml"))


# ---------------------------------------------------------------------- the mean of the tokens


@pytest.fixture(scope="module")
def averaging() -> Any:
    torch.manual_seed(0)
    return in_float64(with_latent(build_small_model(), pooling="mean"))


def mean_states(model: CAFe, sides: list[Any]) -> torch.Tensor:
    """The slow twin: each sequence alone, the states of its latent tokens, added one by one."""
    states = []
    for side in sides:
        rendered = [model.collator.render.embedding(side, "compress")]
        inputs = _inputs(model, rendered)
        hidden = model.model.model(**inputs).last_hidden_state[0]
        ids = model.processor.tokenizer.convert_tokens_to_ids(list(latent_names(COUNT)))
        at = [inputs["input_ids"][0].tolist().index(i) for i in ids]
        states.append(sum(hidden[i] for i in at) / COUNT)
    return torch.stack(states)


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("sharing", ["trie", "none"])
def test_the_mean_has_the_gradients_of_separate_passes(
    averaging: CAFe, chunk: int | None, sharing: str
) -> None:
    model, examples = averaging, make_examples(4)
    embedding_only = JOINT.model_copy(update={"language_weight": 0.0})
    three_passes(model, examples, JOINT.model_copy(update={"contrastive_weight": 0.0}))
    sides = [mean_states(model, [getattr(e, s) for e in examples]) for s in ("query", "target")]
    query, target = (functional.normalize(side) for side in sides)
    scores, own = query @ target.T / 0.05, torch.arange(4)
    loss = (functional.cross_entropy(scores, own) + functional.cross_entropy(scores.T, own)) / 2
    (0.7 * loss).backward()
    expected = gradients(model)
    numbers = run_step(model, examples, JOINT, chunk, sharing)
    assert worst_difference(gradients(model), expected) < 1e-9
    torch.testing.assert_close(numbers.contrastive, loss.detach(), rtol=0, atol=1e-10)
    run_step(model, examples, embedding_only, None, sharing, block_cost=0)
    blocks = gradients(model)
    run_step(model, examples, embedding_only, chunk, sharing)
    assert worst_difference(gradients(model), blocks) < 1e-9


def test_match_questions_are_read_at_their_last_token_as_ever(averaging: CAFe) -> None:
    examples = make_examples(4)
    rows, _ = averaging.collator.prompt_rows([user("Is it red?")])
    assert rows.embedded_at.tolist() == rows.pooled[:, None].tolist()
    for chunk in (None, 2):
        found = run_step(averaging, examples, JOINT.model_copy(update={"match_weight": 0.5}), chunk)
        assert found.match is not None
        averaging.zero_grad()


def test_encode_reads_the_mean_in_shared_rows_and_alone(averaging: CAFe) -> None:
    image = Image(PIL.Image.new("RGB", (96, 96), "red"))
    inputs = [user("a cat"), user("a cat on a mat"), user(image), user(image, "a cat")]
    with torch.no_grad():
        expected = mean_states(averaging, inputs)
    rows, vision = averaging.collator.embedding_rows(inputs)
    shared, _ = averaging.collator.embedding_rows(inputs, token_cost=1.0)
    with torch.no_grad():
        found = averaging.hidden_at(rows, vision)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(averaging.hidden_at(shared, vision), expected, atol=1e-9, rtol=0)
        last = averaging.hidden_at(rows, vision, rows.pooled)
    assert (last - expected).abs().max() > 1e-2, "the last token says something else"


def test_the_pooling_of_a_model_is_kept_and_no_other_asked_for(
    averaging: CAFe, small_model: CAFe
) -> None:
    with pytest.raises(CheckpointError, match="trained with latent_pooling: mean"):
        add_latent_tokens(averaging.model, averaging.processor, COUNT)
    assert averaged_tokens(averaging.model.config) == COUNT

    class Config:
        latent_tokens = 0
        latent_pooling = "mean"

    with pytest.raises(CheckpointError, match=r"config\.json: latent_pooling is 'mean' with 0"):
        averaged_tokens(Config)
    assert averaged_tokens(small_model.model.config) == 0
    with pytest.raises(ValueError, match="latent_pooling: mean is of the latent tokens"):
        Objective(latent_pooling="mean")


def test_sentence_transformers_and_the_server_read_the_same_mean(tmp_path: Path) -> None:
    """Without code of the directory's own; `verify` asks transformers and the server, too."""
    from sentence_transformers import SentenceTransformer

    torch.manual_seed(1)
    model = with_latent(build_small_model(), pooling="mean")
    model.save_pretrained(tmp_path / "model")
    loaded = CAFe.from_pretrained(tmp_path / "model", device="cpu")
    assert loaded.collator.averages == COUNT
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    inputs = ["a red cat", "no", PIL.Image.fromarray(pixels)]
    found = loaded.encode(inputs)
    np.testing.assert_allclose(found, model.encode(inputs), atol=1e-6)
    stock = SentenceTransformer(
        str(tmp_path / "model"), device="cpu", model_kwargs={"dtype": torch.float32}
    )
    assert [type(part).__name__ for part in stock] == [
        "Transformer",
        "WordWeights",
        "Pooling",
        "Normalize",
    ]
    np.testing.assert_allclose(found, stock.encode(inputs), atol=1e-5)
    np.testing.assert_allclose(found[:2], stock.encode_query(inputs[:2]), atol=1e-5)
    assert len(verify(tmp_path / "model").agreements) == 3
    export(tmp_path / "model", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"last_hidden_state[:, {-1 - COUNT}:-1].mean(1)" in card
    assert "--runner pooling" not in card
    contract = loaded.embedding_contract()
    assert contract["averaged (text)"] == f"the {COUNT} tokens before it"


@pytest.mark.slow
def test_a_run_with_the_mean(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", 6, 0)
    recipe = {
        "model": "tiny",
        "output_dir": str(tmp_path / "run"),
        "data": [{"path": str(tmp_path / "scenes" / "captions.json")}],
        "objective": {"latent_tokens": COUNT, "latent_pooling": "mean"},
        "batch": {"examples": 4, "chunk": 2, "workers": 0},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"steps": 2},
        "precision": "fp32",
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    result = train(str(tmp_path / "r.yaml"))
    model = CAFe.from_pretrained(result.model_dir, device="cpu")
    assert model.collator.averages == COUNT
    again = load_recipe(tmp_path / "r.yaml", [f"model={result.model_dir}"])
    assert load_model(again, torch.device("cpu")).collator.averages == COUNT
